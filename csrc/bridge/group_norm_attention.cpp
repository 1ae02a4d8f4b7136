#include "cpu/group_norm_attention.h"

#include "bridge/bridge.h"

namespace fastdiff {
namespace {

std::tuple<Tensor, Tensor> group_norm_attention_cpu(const Tensor& x_, const Tensor& norm_weight, const Tensor& norm_bias,
                                                    int64_t groups, double eps, const Tensor& qkv_weight,
                                                    std::optional<Tensor> qkv_bias, const Tensor& out_weight,
                                                    std::optional<Tensor> out_bias, int64_t heads, double scale,
                                                    double out_scale, std::optional<Tensor> stats) {
  GroupNormAttention a{};
  GroupNormSilu& g = a.norm;
  Tensor x = x_;
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(1) >= 1, "x: expected [N, C, ...] with C >= 1");
  g.n = x.size(0), g.c = x.size(1), g.s = spatial(x), g.groups = groups, g.eps = eps, g.given_stats = stats.has_value();
  STD_TORCH_CHECK(groups >= 1 && g.c % groups == 0, "groups: ", groups, " does not divide the ", g.c, " channels of x");
  STD_TORCH_CHECK(out_weight.dim() == 2, "out_weight: expected [C, E]");
  const int64_t e = out_weight.size(1);
  STD_TORCH_CHECK(heads >= 1 && e >= 1 && e % heads == 0, "heads: ", heads, " does not divide the inner width ", e);
  a.heads = heads, a.d = e / heads, a.scale = scale, a.out_scale = out_scale;

  const auto view = try_view(x, "x");
  if (view && (view->s == 1 || is_rows(*view))) g.x = *view;
  else x = as_contiguous(x), g.x = *try_view(x, "x");

  const ScalarType type = accumulate(x), operand = takes_bfloat16(g.x.dtype, g.c, a.d) ? ScalarType::BFloat16 : type;
  const int64_t of_c[] = {g.c}, of_qkv[] = {3 * e}, of_in[] = {3 * e, g.c}, of_out[] = {g.c, e},
      of_stats[] = {g.n, groups, 2};
  const Tensor w = parameter(norm_weight, type, Shape(of_c, 1), "norm_weight"),
      b = parameter(norm_bias, type, Shape(of_c, 1), "norm_bias");
  const Tensor in = parameter(qkv_weight, operand, Shape(of_in, 2), "qkv_weight"),
      out = parameter(out_weight, operand, Shape(of_out, 2), "out_weight");
  const auto in_bias = parameter(qkv_bias, type, Shape(of_qkv, 1), "qkv_bias"),
      bias = parameter(out_bias, type, Shape(of_c, 1), "out_bias");
  g.weight = w.data_ptr(), g.bias = b.data_ptr();
  a.qkv_weight = in.data_ptr(), a.qkv_bias = data(in_bias), a.out_weight = out.data_ptr(), a.out_bias = data(bias);

  Tensor kept = torch::stable::new_empty(x, Shape(of_stats, 3), type);
  if (stats) torch::stable::copy_(kept, parameter(*stats, type, Shape(of_stats, 3), "stats"));
  g.stats = kept.data_ptr();
  Result y(x_, g.x);
  g.y = y.view;
  group_norm_attention(a);
  return {y.finish(), kept};
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("group_norm_attention", TORCH_BOX(&fastdiff::group_norm_attention_cpu));
}
