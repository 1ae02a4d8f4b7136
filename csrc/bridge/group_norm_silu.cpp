#include "cpu/group_norm_silu.h"

#include "bridge/bridge.h"

namespace fastdiff {
namespace {

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
  m.impl("group_norm_silu", TORCH_BOX(&fastdiff::group_norm_silu_cpu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&fastdiff::group_norm_silu_backward_cpu));
}
