#include "cpu/conv3x3.h"

#include <array>
#include <string>

#include "bridge/channels_last.h"

namespace fastdiff {
namespace {

typedef std::tuple<Tensor, Tensor, Tensor> Result;

// What is no kernel's: PyTorch's convolution between our other ops.
Result composed(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, int64_t groups, double eps,
                const std::optional<Tensor>& add, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                const std::optional<Tensor>& stats, bool silu, const std::optional<Tensor>& residual, double out_scale,
                int64_t stats_groups, const std::optional<Tensor>& packed) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 17> stack{
      from(x),     from(weight), from(bias),     from(norm_weight), from(norm_bias),    from(groups), from(eps),
      from(add),   from(scale),  from(shift),    from(stats),       from(silu),         from(residual), from(out_scale),
      from(stats_groups), from(packed), from(std::string("direct"))};
  const auto failed = torch_call_dispatcher("fastdiff::conv3x3_composed", "", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(!failed, "conv3x3: its composition of other ops failed");
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

Winograd winograd_of(const std::string& algorithm, const Tensor& x) {
  if (algorithm == "winograd4" || algorithm == "winograd4_lean") {
    STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, "algorithm: ", algorithm, " sums in float32, x is float64; use direct");
    return algorithm == "winograd4" ? Winograd::f4 : Winograd::f4_lean;
  }
  if (algorithm == "winograd6") {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                    "algorithm: winograd6 takes float32 alone; use winograd4_lean or direct");
    STD_TORCH_CHECK(isa.load() >= 2, "algorithm: winograd6 needs AVX-512, the instruction set in use is ",
                    kIsaNames[isa.load()], "; use winograd4_lean or direct");
    return Winograd::f6;
  }
  const bool integers = algorithm == "winograd4_int16";
  STD_TORCH_CHECK(integers || algorithm == "winograd2", "algorithm: ", algorithm,
                  " is not known; use direct, winograd4, winograd4_lean, winograd6, winograd4_int16 or winograd2");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "algorithm: ", algorithm,
                  " takes bfloat16 alone; use winograd4 or direct");
  STD_TORCH_CHECK(!integers || isa.load() >= 1, "algorithm: winograd4_int16 needs AVX2, the instruction set in use is ",
                  kIsaNames[isa.load()], "; use winograd4 or direct");
  if (integers) return Winograd::f4_int16;
  STD_TORCH_CHECK(isa.load() == 3, "algorithm: winograd2 needs AVX512-BF16, the instruction set in use is ",
                  kIsaNames[isa.load()], "; use winograd4 or direct");
  return Winograd::f2;
}

// [values of a filter, I, O], I and O rounded up, in the order that the kernel reads; for integers all in one row, and a float
// for each O and each I behind them; for f6 [1, values I, O].
void check_packed(const std::optional<Tensor>& packed, const std::string& name, Winograd algorithm, int64_t inputs,
                  int64_t outputs) {
  STD_TORCH_CHECK(packed, "packed: needed by Winograd's algorithms; conv3x3_pack(weight, algorithm) makes it");
  check_cpu(*packed, "packed");
  const bool integers = algorithm == Winograd::f4_int16, pairs = integers || algorithm == Winograd::f2;
  const bool six = algorithm == Winograd::f6;
  const int64_t values = algorithm == Winograd::f2 ? 16 : algorithm == Winograd::f4_lean || six ? 9 : 36;
  const int64_t i = pairs ? (inputs + 1) / 2 * 2 : inputs, o = (outputs + kUnit - 1) / kUnit * kUnit;
  const int64_t expected[] = {integers || six ? 1 : values, integers ? 1 : six ? values * i : i,
                              integers ? values * i * o + 2 * (i + o) : o};
  const ScalarType type = integers ? ScalarType::Short : pairs ? ScalarType::BFloat16 : ScalarType::Float;
  bool fits = packed->dim() == 3 && packed->scalar_type() == type;
  for (int64_t d = 0; fits && d < 3; ++d) fits = packed->size(d) == expected[d];
  STD_TORCH_CHECK(fits && packed->is_contiguous(), "packed: is not this weight's by ", name, ", which is contiguous ",
                  integers ? "int16 [" : pairs ? "bfloat16 [" : "float32 [", expected[0], ", ", expected[1], ", ",
                  expected[2], "]; pack it again");
}

Result conv3x3_cpu(const Tensor& x_, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight,
                   std::optional<Tensor> norm_bias, int64_t groups, double eps, std::optional<Tensor> add,
                   std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> stats, bool silu,
                   std::optional<Tensor> residual, double out_scale, int64_t stats_groups, std::optional<Tensor> packed,
                   std::string algorithm) {
  if (algorithm == "direct" || x_.numel() == 0)
    return composed(x_, weight, bias, norm_weight, norm_bias, groups, eps, add, scale, shift, stats, silu, residual,
                    out_scale, stats_groups, algorithm == "direct" ? packed : std::nullopt);
  const Winograd winograd = winograd_of(algorithm, x_);
  STD_TORCH_CHECK(x_.dim() == 4, "x: expected [N, I, H, W]");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) >= 1 && weight.size(1) == x_.size(1) && weight.size(2) == 3 &&
                  weight.size(3) == 3, "weight: expected [O, I, 3, 3] with the I of x");
  Conv3x3 a{};
  GroupNormSilu& g = a.norm;
  g.n = x_.size(0), g.c = x_.size(1), g.s = spatial(x_), g.groups = groups, g.eps = eps, g.silu = silu;
  g.given_stats = stats.has_value();
  a.h = x_.size(2), a.w = x_.size(3), a.o = weight.size(0), a.out_scale = static_cast<float>(out_scale);
  a.stats_groups = stats_groups;
  STD_TORCH_CHECK(stats_groups >= 0 && (stats_groups == 0 || a.o % stats_groups == 0), "stats_groups: ", stats_groups,
                  " does not divide the ", a.o, " channels of y");
  check_packed(packed, algorithm, winograd, g.c, a.o);
  a.packed = packed->data_ptr();

  const auto f32 = ScalarType::Float;
  const int64_t of_c[] = {g.c}, of_nc[] = {g.n, g.c}, of_o[] = {a.o}, of_no[] = {g.n, a.o};
  const bool per_sample = bias && bias->dim() == 2;
  const auto b = parameter(bias, f32, per_sample ? Shape(of_no, 2) : Shape(of_o, 1), "bias");
  a.bias = static_cast<const float*>(data(b)), a.bias_n = per_sample ? a.o : 0;
  STD_TORCH_CHECK(!norm_weight || (norm_bias && groups >= 1 && g.c % groups == 0), "groups: ", groups, " does not divide the ",
                  g.c, " channels of x, or norm_bias is missing");
  const auto nw = parameter(norm_weight, f32, Shape(of_c, 1), "norm_weight"),
      nb = parameter(norm_weight ? norm_bias : std::nullopt, f32, Shape(of_c, 1), "norm_bias"),
      na = parameter(add, f32, Shape(of_nc, 2), "add"), ns = parameter(scale, f32, Shape(of_nc, 2), "scale"),
      nt = parameter(shift, f32, Shape(of_nc, 2), "shift");
  g.weight = data(nw), g.bias = data(nb), g.add = data(na), g.scale = data(ns), g.shift = data(nt);
  const int64_t of_x[] = {g.n, norm_weight ? groups : 0, 2}, of_y[] = {g.n, stats_groups, 2};
  const Tensor stats_x = torch::stable::new_empty(x_, Shape(of_x, 3), f32),
      stats_y = torch::stable::new_empty(x_, Shape(of_y, 3), f32);
  if (norm_weight && stats) torch::stable::copy_(const_cast<Tensor&>(stats_x), parameter(*stats, f32, Shape(of_x, 3), "stats"));
  g.stats = stats_x.data_ptr(), a.stats = static_cast<float*>(stats_y.data_ptr());

  const Tensor x = channels_last(x_, "x", g.x);
  std::optional<Tensor> r;
  if (residual) {
    const int64_t shape[] = {g.n, a.o, a.h, a.w};
    bool fits = residual->dim() == 4 && residual->scalar_type() == x_.scalar_type();
    for (int64_t i = 0; fits && i < 4; ++i) fits = residual->size(i) == shape[i];
    STD_TORCH_CHECK(fits, "residual: expected [N, O, H, W] of x's type");
    r = channels_last(*residual, "residual", a.residual);
  }
  Tensor y = new_channels_last(x_, g.n, a.o, a.h, a.w);
  a.y = *try_view(y, "y");
  conv3x3(a, winograd);
  if (x_.stride(1) != 1 || x_.stride(3) == 1) {
    const int64_t shape[] = {g.n, a.o, a.h, a.w};
    Tensor planes = torch::stable::new_empty(x_, Shape(shape, 4));
    y = torch::stable::copy_(planes, y);
  }
  return {y, stats_y, stats_x};
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("conv3x3", TORCH_BOX(&fastdiff::conv3x3_cpu)); }
