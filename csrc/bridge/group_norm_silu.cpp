#include "cpu/group_norm_silu.h"

#include "bridge/bridge.h"
#ifdef USE_CUDA
#include "cuda/group_norm_silu.h"
#endif

namespace fastdiff {
namespace {

// The arguments that forward and backward share. Owns what had to be converted.
struct NormArguments {
  GroupNormSilu g{};
  Tensor x, weight, bias;
  std::optional<Tensor> add, scale, shift;

  NormArguments(const Tensor& x_, const Tensor& w, const Tensor& b, int64_t groups, double eps,
                const std::optional<Tensor>& add_, const std::optional<Tensor>& scale_, const std::optional<Tensor>& shift_,
                bool silu)
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
    else x = as_contiguous(x), g.x = *try_view(x, "x");
  }
};


std::tuple<Tensor, Tensor> group_norm_silu_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
                                               double eps, std::optional<Tensor> add, std::optional<Tensor> scale,
                                               std::optional<Tensor> shift, std::optional<Tensor> stats, bool silu) {
  NormArguments a(x, weight, bias, groups, eps, add, scale, shift, silu);
  const int64_t shape[] = {a.g.n, groups, 2};
  Tensor kept = torch::stable::new_empty(x, Shape(shape, 3), accumulate(x));
  if (stats) torch::stable::copy_(kept, parameter(*stats, accumulate(x), Shape(shape, 3), "stats"));
  a.g.stats = kept.data_ptr(), a.g.given_stats = stats.has_value();
  Result y(x, a.g.x);
  a.g.y = y.view;
  group_norm_silu(a.g);
  return {y.finish(), kept};
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
    const Result copy(a.x, a.g.x);
    Tensor to = copy.used;
    grad = torch::stable::copy_(to, grad);
    view = copy.view;
  }
  a.g.dy = *view;
  Result dx(x, a.g.x);
  a.g.dx = dx.view;
  Tensor dweight = like_or_empty(x, weight, type), dbias = like_or_empty(x, bias, type);
  Tensor dadd = like_or_empty(x, add, type), dscale = like_or_empty(x, scale, type), dshift = like_or_empty(x, shift, type);
  a.g.dweight = dweight.data_ptr(), a.g.dbias = dbias.data_ptr();
  a.g.dadd = add ? dadd.data_ptr() : nullptr, a.g.dscale = scale ? dscale.data_ptr() : nullptr;
  a.g.dshift = shift ? dshift.data_ptr() : nullptr;
  group_norm_silu_backward(a.g);
  return {dx.finish(), in_dtype_of(weight, dweight), in_dtype_of(bias, dbias), in_dtype_of(add, dadd),
          in_dtype_of(scale, dscale), in_dtype_of(shift, dshift)};
}

#ifdef USE_CUDA
typedef std::tuple<Tensor, Tensor> Result;

// Everything that the channels-last kernel does not take: contiguous channels, float64, slices too large for a cluster.
Result from_triton(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
                   const std::optional<Tensor>& add, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                   const std::optional<Tensor>& stats, bool silu) {
  using torch::stable::detail::from;
  std::array<StableIValue, 10> stack{from(x),   from(weight), from(bias),  from(groups), from(eps),
                                     from(add), from(scale),  from(shift), from(stats),  from(silu)};
  const auto failed = torch_call_dispatcher("fastdiff::group_norm_silu_triton", "", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(!failed, "group_norm_silu: its Triton kernel failed");
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// Parameters stay in their types. `owned` keeps what had to be made contiguous.
Parameter on_device(const std::optional<Tensor>& t, const Tensor& x, Shape shape, const char* name,
                    std::optional<Tensor>& owned) {
  if (!t) return {};
  STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == x.get_device_index(), name, ": must be on the device of x");
  bool fits = t->sizes().size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = t->sizes()[i] == shape[i];
  STD_TORCH_CHECK(fits, name, ": its shape does not fit x");
  owned = as_contiguous(*t);
  return {owned->data_ptr(), dtype_of(owned->scalar_type(), name)};
}

// Pixels' channels without gaps, every pixel on a 16-byte border.
bool in_vectors(const std::optional<View>& v, int64_t element) {
  const int64_t vector = 16 / element;
  return v && is_rows(*v) && v->n % vector == 0 && v->s % vector == 0 && reinterpret_cast<uintptr_t>(v->data) % 16 == 0;
}

Result group_norm_silu_on_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
                               std::optional<Tensor> add, std::optional<Tensor> scale, std::optional<Tensor> shift,
                               std::optional<Tensor> stats, bool silu) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() >= 2, "x: expected [N, C, ...] on a CUDA device");
  STD_TORCH_CHECK(groups >= 1 && x.size(1) % groups == 0, "groups: ", groups, " does not divide the ", x.size(1),
                  " channels of x");
  const auto general = [&] { return from_triton(x, weight, bias, groups, eps, add, scale, shift, stats, silu); };
  const auto view = view_of(x, "x");
  const int64_t element = x.scalar_type() == ScalarType::Float ? 4 : 2;
  if (x.scalar_type() == ScalarType::Double || x.numel() == 0 || !in_vectors(view, element)) return general();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  GroupNormSiluCuda a{};
  a.x = view->data, a.dtype = view->dtype, a.x_n = view->n, a.x_s = view->s;
  a.n = x.size(0), a.c = x.size(1), a.s = spatial(x), a.groups = groups;
  a.eps = static_cast<float>(eps), a.silu = silu, a.given = stats.has_value();
  const NormPlan plan = plan_norm_here(a);
  if (plan.width == 0) return general();
  Tensor y = torch::stable::empty_like(x);
  const auto out = view_of(y, "y");
  if (!in_vectors(out, element)) return general();
  a.y = out->data, a.y_n = out->n, a.y_s = out->s;
  const int64_t c[] = {a.c}, nc[] = {a.n, a.c}, of_groups[] = {a.n, groups, 2};
  std::optional<Tensor> owned[6];
  a.weight = on_device(weight, x, Shape(c, 1), "weight", owned[0]),
      a.bias = on_device(bias, x, Shape(c, 1), "bias", owned[1]);
  a.add = on_device(add, x, Shape(nc, 2), "add", owned[2]), a.scale = on_device(scale, x, Shape(nc, 2), "scale", owned[3]);
  a.shift = on_device(shift, x, Shape(nc, 2), "shift", owned[4]);
  Tensor kept = torch::stable::new_empty(x, Shape(of_groups, 3), ScalarType::Float);
  if (stats) {
    on_device(stats, x, Shape(of_groups, 3), "stats", owned[5]);
    torch::stable::copy_(kept, *owned[5]);
  }
  a.stats = static_cast<float*>(kept.data_ptr());
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == 0, "no current CUDA stream");
  const char* error = group_norm_silu_cuda(a, plan, stream);
  STD_TORCH_CHECK(!error, "group_norm_silu: ", error ? error : "");
  return {y, kept};
}
#endif

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&fastdiff::group_norm_silu_cpu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&fastdiff::group_norm_silu_backward_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("group_norm_silu", TORCH_BOX(&fastdiff::group_norm_silu_on_cuda)); }
#endif
