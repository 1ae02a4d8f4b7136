// The bridge between PyTorch's dispatcher and the kernels: the only file with torch headers (the stable ABI, so that one
// build loads in every torch from 2.11 on). Schemas live in fastdiff/ops/*.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/add_noise.h"
#include "cpu/denoise_step.h"
#include "cpu/group_norm_silu.h"
#include "cpu/philox_normal.h"
#ifdef USE_CUDA
#include "cuda/philox_normal.h"
#endif

namespace fastdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

void parallel_for_raw(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}
int64_t threads() { return torch::stable::get_num_threads(); }

namespace {

Dtype dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, name, ": only float32, bfloat16, float16 and float64 are supported"); return Dtype::f32;
  }
}
ScalarType accumulate(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check_cpu(const Tensor& t, const char* name) { STD_TORCH_CHECK(t.is_cpu(), name, ": must be on the CPU like the first argument"); }

// Views of [N, C, ...] whose spatial dimensions share one stride; none where they do not.
std::optional<View> try_view(const Tensor& t, const char* name) {
  check_cpu(t, name);
  const auto sizes = t.sizes(), strides = t.strides();
  View v;
  v.dtype = dtype_of(t.scalar_type(), name);
  v.data = t.data_ptr();
  v.n = sizes.size() > 0 ? strides[0] : 0;
  v.c = sizes.size() > 1 ? strides[1] : 1;
  int64_t s = 0, expected = -1;
  for (size_t i = sizes.size(); i-- > 2;) {
    if (sizes[i] == 1) continue;
    if (expected < 0) s = strides[i];
    else if (strides[i] != expected) return std::nullopt;
    expected = strides[i] * sizes[i];
  }
  v.s = expected < 0 ? 1 : s;
  if (expected < 0 && sizes.size() > 1 && sizes[1] > 1 && v.c == 1) v.s = sizes[1];  // one pixel: its channels are the run
  return v;
}

int64_t spatial(const Tensor& t) {
  int64_t s = 1;
  for (size_t i = 2; i < t.sizes().size(); ++i) s *= t.sizes()[i];
  return s;
}

bool is_rows(const View& v) { return v.s != 1 && v.c == 1; }
bool same_kind(const View& a, const View& b) { return (a.s == 1 && b.s == 1) || (is_rows(a) && is_rows(b)); }

// A small parameter as a contiguous tensor of the accumulation type; kept alive by the caller.
Tensor parameter(const Tensor& t, ScalarType type, Shape shape, const char* name) {
  check_cpu(t, name);
  bool fits = t.sizes().size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = t.sizes()[i] == shape[i];
  STD_TORCH_CHECK(fits, name, ": its shape does not fit x");
  Tensor r = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return r.is_contiguous() ? r : torch::stable::contiguous(r);
}
std::optional<Tensor> parameter(const std::optional<Tensor>& t, ScalarType type, Shape shape, const char* name) {
  if (!t) return std::nullopt;
  return parameter(*t, type, shape, name);
}
const void* data(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

// ---- philox_normal

Tensor philox_normal_cpu(const Tensor& seeds, int64_t draw, int64_t domain, std::vector<int64_t> shape, ScalarType dtype) {
  check_cpu(seeds, "seeds");
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1, "seeds: expected int64 [B]");
  shape.insert(shape.begin(), seeds.size(0));
  Tensor out = torch::stable::new_empty(seeds, shape, dtype);
  if (out.numel() == 0) return out;
  const Tensor keys = torch::stable::contiguous(seeds);
  philox_normal({out.data_ptr(), dtype_of(dtype, "dtype"), static_cast<const int64_t*>(keys.data_ptr()), draw, domain,
                 seeds.size(0), out.numel() / seeds.size(0)});
  return out;
}

#ifdef USE_CUDA
Tensor philox_normal_on_cuda(const Tensor& seeds, int64_t draw, int64_t domain, std::vector<int64_t> shape, ScalarType dtype) {
  STD_TORCH_CHECK(seeds.is_cuda(), "seeds: must be on a CUDA device");
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1, "seeds: expected int64 [B]");
  const auto device = seeds.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  shape.insert(shape.begin(), seeds.size(0));
  Tensor out = torch::stable::new_empty(seeds, shape, dtype);
  if (out.numel() == 0) return out;
  const Tensor keys = torch::stable::contiguous(seeds);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no current CUDA stream");
  const char* error = philox_normal_cuda({out.data_ptr(), dtype_of(dtype, "dtype"), static_cast<const int64_t*>(keys.data_ptr()),
                                          draw, domain, seeds.size(0), out.numel() / seeds.size(0)}, stream);
  STD_TORCH_CHECK(!error, "philox_normal: ", error ? error : "");
  return out;
}
#endif

// ---- add_noise

const int64_t* seed_data(const Tensor& seeds, int64_t n) {
  check_cpu(seeds, "seeds");
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1 && seeds.size(0) == n, "seeds: expected int64 [", n, "]");
  return static_cast<const int64_t*>(seeds.data_ptr());
}

Tensor add_noise_cpu(const Tensor& x0, const Tensor& seeds, const Tensor& coefficients, int64_t draw, int64_t domain) {
  STD_TORCH_CHECK(x0.dim() >= 1, "x0: expected [B, ...]");
  STD_TORCH_CHECK(coefficients.dim() == 3, "coefficients: expected [B, K, 2]");
  const int64_t n = x0.size(0), k = coefficients.size(1), expected[] = {n, k, 2};
  std::vector<int64_t> shape(x0.sizes().begin(), x0.sizes().end());
  shape.insert(shape.begin(), k);
  Tensor out = torch::stable::new_empty(x0, shape);
  const Tensor c = parameter(coefficients, accumulate(x0), Shape(expected, 3), "coefficients");
  const Tensor keys = torch::stable::contiguous(seeds);
  AddNoise a{};
  a.seeds = seed_data(keys, n);
  if (out.numel() == 0) return out;
  Tensor x = x0;
  auto view = try_view(x, "x0");
  if (!view) x = torch::stable::contiguous(x), view = try_view(x, "x0");
  a.x0 = *view, a.out = out.data_ptr(), a.coefficients = c.data_ptr();
  a.n = n, a.c = x.dim() > 1 ? x.size(1) : 1, a.s = spatial(x), a.k = k, a.draw = draw, a.domain = domain;
  add_noise(a);
  return out;
}

// ---- denoise_step

// A tensor that the kernel reads and maybe writes in place; where its layout is none of ours, a copy that `finish` returns.
struct InPlace {
  Tensor original, used;
  View view;
  InPlace(const Tensor& t, const char* name) : original(t), used(t) {
    auto v = try_view(t, name);
    if (!v) used = torch::stable::contiguous(t), v = try_view(used, name);
    view = *v;
  }
  void finish() {
    if (used.get() != original.get()) torch::stable::copy_(original, used);
  }
};

void check_shape(const Tensor& t, const Tensor& x, const char* name) {
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == x.size(i);
  STD_TORCH_CHECK(same, name, ": its shape differs from x");
}

void denoise_step_cpu(Tensor x, std::optional<Tensor> f, Tensor saved, Tensor history, Tensor net_in, const Tensor& seeds,
                      const Tensor& coefficients, const Tensor& codes, const Tensor& row) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x: expected float32 or float64");
  STD_TORCH_CHECK(x.dim() >= 1 && history.dim() == x.dim() + 1, "history: expected [slots, *x.shape]");
  STD_TORCH_CHECK(saved.scalar_type() == type && history.scalar_type() == type && coefficients.scalar_type() == type,
                  "saved, history and coefficients must have x's dtype");
  const int64_t rows = coefficients.dim() == 2 ? coefficients.size(0) : -1, n = x.size(0);
  STD_TORCH_CHECK(rows >= 0 && coefficients.size(1) == column::kCount, "coefficients: expected [rows, ", int(column::kCount), "]");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Int && codes.dim() == 2 && codes.size(0) == rows && codes.size(1) == code::kCount,
                  "codes: expected int32 [rows, ", int(code::kCount), "]");
  STD_TORCH_CHECK(row.scalar_type() == ScalarType::Long && row.dim() == 1 && (row.size(0) == 1 || row.size(0) == n), "row: expected int64 [1] or [B]");
  check_cpu(coefficients, "coefficients"), check_cpu(codes, "codes"), check_cpu(row, "row");
  check_shape(net_in, x, "net_in");
  if (f) check_shape(*f, x, "F");
  const bool has_saved = saved.numel() > 0;
  if (has_saved) check_shape(saved, x, "saved");
  for (int64_t i = 0; i < x.dim(); ++i) STD_TORCH_CHECK(history.size(i + 1) == x.size(i), "history: expected [slots, *x.shape]");

  const Tensor table = torch::stable::contiguous(coefficients), code_table = torch::stable::contiguous(codes);
  const Tensor keys = torch::stable::contiguous(seeds), row_list = torch::stable::contiguous(row);
  DenoiseStep a{};
  a.seeds = seed_data(keys, n);
  a.n = n, a.c = x.dim() > 1 ? x.size(1) : 1, a.s = spatial(x), a.slots = history.size(0);
  a.coefficients = table.data_ptr(), a.codes = static_cast<const int32_t*>(code_table.data_ptr());
  a.row = static_cast<const int64_t*>(row_list.data_ptr()), a.row_per_sample = row.size(0) == n && n != 1;
  for (int64_t i = 0; i < row.size(0); ++i)
    STD_TORCH_CHECK(a.row[i] >= 0 && a.row[i] < rows, "row: ", a.row[i], " is outside the plan's ", rows, " rows");
  if (x.numel() == 0) return;

  InPlace state(x, "x"), input(net_in, "net_in"), save(has_saved ? saved : x, "saved");
  Tensor slots = history;
  if (a.slots > 0) {
    auto first = try_view(torch::stable::select(slots, 0, 0), "history");
    if (!first) slots = torch::stable::contiguous(slots), first = try_view(torch::stable::select(slots, 0, 0), "history");
    a.history = *first, a.slot_stride = slots.stride(0);
  }
  std::optional<InPlace> network;
  if (f) network.emplace(*f, "F"), a.f = network->view;
  a.x = state.view, a.net_in = input.view;
  if (has_saved) a.saved = save.view;
  denoise_step(a);
  state.finish(), input.finish();
  if (has_saved) save.finish();
  if (slots.get() != history.get()) torch::stable::copy_(history, slots);
}

// ---- group_norm_silu

// The arguments that forward and backward share. Owns what had to be converted.
struct NormArguments {
  GroupNormSilu g{};
  Tensor x, weight, bias;
  std::optional<Tensor> add, scale, shift;

  NormArguments(const Tensor& x_, const Tensor& w, const Tensor& b, int64_t groups, double eps, const std::optional<Tensor>& add_,
                const std::optional<Tensor>& scale_, const std::optional<Tensor>& shift_, bool silu)
      : x(x_), weight(w), bias(b) {
    STD_TORCH_CHECK(x.dim() >= 2, "x: expected [N, C, ...]");
    g.n = x.size(0), g.c = x.size(1), g.s = spatial(x), g.groups = groups, g.eps = eps, g.silu = silu;
    STD_TORCH_CHECK(groups >= 1 && g.c % groups == 0, "groups: ", groups, " does not divide the ", g.c, " channels of x");
    const ScalarType type = accumulate(x);
    const int64_t c[] = {g.c}, nc[] = {g.n, g.c};
    weight = parameter(w, type, Shape(c, 1), "weight"), bias = parameter(b, type, Shape(c, 1), "bias");
    add = parameter(add_, type, Shape(nc, 2), "add"), scale = parameter(scale_, type, Shape(nc, 2), "scale");
    shift = parameter(shift_, type, Shape(nc, 2), "shift");
    g.weight = weight.data_ptr(), g.bias = bias.data_ptr();
    g.add = data(add), g.scale = data(scale), g.shift = data(shift);
    const auto view = try_view(x, "x");
    if (view && (view->s == 1 || is_rows(*view))) g.x = *view;
    else x = torch::stable::contiguous(x), g.x = *try_view(x, "x");
  }
};

// `like`'s strides where the kernel can write them beside its input, else a contiguous stand-in.
Tensor result_like(const Tensor& like, const View& beside, View& view) {
  Tensor t = torch::stable::empty_like(like);
  auto v = try_view(t, "result");
  if (!v || !same_kind(*v, beside)) {
    t = torch::stable::new_empty(like, like.sizes());
    v = try_view(t, "result");
  }
  view = *v;
  return t;
}
Tensor with_strides_of(const Tensor& like, const Tensor& made) {
  Tensor t = torch::stable::empty_like(like);
  for (size_t i = 0; i < t.sizes().size(); ++i)
    if (t.sizes()[i] > 1 && t.strides()[i] != made.strides()[i]) return torch::stable::copy_(t, made);
  return made;
}

std::tuple<Tensor, Tensor> group_norm_silu_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
                                               std::optional<Tensor> add, std::optional<Tensor> scale, std::optional<Tensor> shift,
                                               std::optional<Tensor> stats, bool silu) {
  NormArguments a(x, weight, bias, groups, eps, add, scale, shift, silu);
  const int64_t shape[] = {a.g.n, groups, 2};
  Tensor kept = torch::stable::new_empty(x, Shape(shape, 3), accumulate(x));
  if (stats) torch::stable::copy_(kept, parameter(*stats, accumulate(x), Shape(shape, 3), "stats"));
  a.g.stats = kept.data_ptr(), a.g.given_stats = stats.has_value();
  Tensor y = result_like(a.x, a.g.x, a.g.y);
  group_norm_silu(a.g);
  return {with_strides_of(x, y), kept};
}

Tensor like_or_empty(const Tensor& x, const std::optional<Tensor>& t, ScalarType type) {
  const int64_t none[] = {0};
  return t ? torch::stable::new_empty(*t, t->sizes(), type) : torch::stable::new_empty(x, Shape(none, 1));
}
Tensor in_dtype_of(const std::optional<Tensor>& like, const Tensor& t) {
  return !like || like->scalar_type() == t.scalar_type() ? t : torch::stable::to(t, like->scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
    std::optional<Tensor> add, std::optional<Tensor> scale, std::optional<Tensor> shift, const Tensor& stats, bool silu) {
  NormArguments a(x, weight, bias, groups, eps, add, scale, shift, silu);
  const ScalarType type = accumulate(x);
  const int64_t shape[] = {a.g.n, groups, 2};
  const Tensor kept = parameter(stats, type, Shape(shape, 3), "stats");
  a.g.stats = kept.data_ptr();
  STD_TORCH_CHECK(dy.numel() == x.numel() && dy.dim() == x.dim(), "dy: its shape differs from x");
  Tensor grad = dy.scalar_type() == x.scalar_type() ? dy : torch::stable::to(dy, x.scalar_type());
  auto view = try_view(grad, "dy");
  if (!view || !same_kind(*view, a.g.x)) {  // bring dy to x's layout
    Tensor copy = result_like(a.x, a.g.x, a.g.dy);
    grad = torch::stable::copy_(copy, grad);
    view = try_view(grad, "dy");
  }
  a.g.dy = *view;
  Tensor dx = result_like(a.x, a.g.x, a.g.dx);
  Tensor dweight = like_or_empty(x, weight, type), dbias = like_or_empty(x, bias, type);
  Tensor dadd = like_or_empty(x, add, type), dscale = like_or_empty(x, scale, type), dshift = like_or_empty(x, shift, type);
  a.g.dweight = dweight.data_ptr(), a.g.dbias = dbias.data_ptr();
  a.g.dadd = add ? dadd.data_ptr() : nullptr, a.g.dscale = scale ? dscale.data_ptr() : nullptr;
  a.g.dshift = shift ? dshift.data_ptr() : nullptr;
  group_norm_silu_backward(a.g);
  return {with_strides_of(x, dx), in_dtype_of(weight, dweight), in_dtype_of(bias, dbias), in_dtype_of(add, dadd),
          in_dtype_of(scale, dscale), in_dtype_of(shift, dshift)};
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&fastdiff::philox_normal_cpu));
  m.impl("add_noise", TORCH_BOX(&fastdiff::add_noise_cpu));
  m.impl("denoise_step", TORCH_BOX(&fastdiff::denoise_step_cpu));
  m.impl("group_norm_silu", TORCH_BOX(&fastdiff::group_norm_silu_cpu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&fastdiff::group_norm_silu_backward_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("philox_normal", TORCH_BOX(&fastdiff::philox_normal_on_cuda)); }
#endif
