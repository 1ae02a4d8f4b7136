// What the bridges between PyTorch's dispatcher and the kernels share. Only this folder has torch headers (the stable ABI,
// so that one build loads in every torch from 2.11 on); schemas live in fastdiff/ops/*.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/common.h"

namespace fastdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

inline Dtype dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, name, ": only float32, bfloat16, float16 and float64 are supported"); return Dtype::f32;
  }
}
inline ScalarType accumulate(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_cpu(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": must be on the CPU like the first argument");
}

// Views of [N, C, ...] whose spatial dimensions share one stride; none where they do not. On any device. `skip` leading
// dimensions are left out.
inline std::optional<View> view_of(const Tensor& t, const char* name, int64_t skip = 0) {
  const int64_t dim = t.dim() - skip;
  const Shape sizes(t.sizes().data() + skip, dim), strides(t.strides().data() + skip, dim);
  View v;
  v.dtype = dtype_of(t.scalar_type(), name);
  v.data = t.data_ptr();
  v.n = sizes.size() > 0 ? strides[0] : 0;
  v.c = sizes.size() > 1 ? strides[1] : 1;
  int64_t s = 0, expected = -1;
  for (size_t i = sizes.size(); i-- > 2;) {
    if (sizes[i] <= 1 || t.numel() == 0) continue;  // no elements: any strides do, and contiguous() would keep them
    if (expected < 0) s = strides[i];
    else if (strides[i] != expected) return std::nullopt;
    expected = strides[i] * sizes[i];
  }
  v.s = expected < 0 ? 1 : s;
  if (expected < 0 && sizes.size() > 1 && sizes[1] > 1 && v.c == 1) v.s = sizes[1];  // one pixel: its channels are the run
  return v;
}
inline std::optional<View> try_view(const Tensor& t, const char* name) {
  check_cpu(t, name);
  return view_of(t, name);
}

inline int64_t spatial(const Tensor& t) {
  int64_t s = 1;
  for (size_t i = 2; i < t.sizes().size(); ++i) s *= t.sizes()[i];
  return s;
}

// Channels-last; not pixels that are all one, whose results have another layout.
inline bool is_rows(const View& v) { return v.s > 1 && v.c == 1; }
inline bool same_kind(const View& a, const View& b) { return (a.s == 1 && b.s == 1) || (is_rows(a) && is_rows(b)); }

// ATen's operators are found by name, a microsecond each: not asked for what is there already.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A small parameter as a contiguous tensor of the accumulation type; kept alive by the caller.
inline Tensor parameter(const Tensor& t, ScalarType type, Shape shape, const char* name) {
  check_cpu(t, name);
  bool fits = t.sizes().size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = t.sizes()[i] == shape[i];
  STD_TORCH_CHECK(fits, name, ": its shape does not fit x");
  dtype_of(t.scalar_type(), name);
  return as_contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type));
}
inline std::optional<Tensor> parameter(const std::optional<Tensor>& t, ScalarType type, Shape shape, const char* name) {
  if (!t) return std::nullopt;
  return parameter(*t, type, shape, name);
}
inline const void* data(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

inline const int64_t* seed_data(const Tensor& seeds, int64_t n) {
  check_cpu(seeds, "seeds");
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1 && seeds.size(0) == n,
                  "seeds: expected int64 [", n, "]");
  return static_cast<const int64_t*>(seeds.data_ptr());
}

// A tensor that the kernel reads and maybe writes in place; where its layout is none of ours, a copy that `finish` returns.
struct InPlace {
  Tensor original, used;
  View view;
  InPlace(const Tensor& t, const char* name) : original(t), used(t) {
    auto v = view_of(t, name);
    if (!v) used = torch::stable::contiguous(t), v = view_of(used, name);
    view = *v;
  }
  void finish() {
    if (used.get() != original.get()) torch::stable::copy_(original, used);
  }
};

inline void check_device(const Tensor& t, const Tensor& x, const char* name) {
  const bool same = t.is_cuda() == x.is_cuda() && t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index();
  STD_TORCH_CHECK(same, name, ": must be on the device of the first argument");
}

#ifdef USE_CUDA
// The device of `t` made current, and its stream.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "no current CUDA stream");
  }
};
inline void check_launch(const char* error, const char* op) { STD_TORCH_CHECK(!error, op, ": ", error ? error : ""); }
#endif

inline void check_shape(const Tensor& t, const Tensor& x, const char* name) {
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == x.size(i);
  STD_TORCH_CHECK(same, name, ": its shape differs from x");
}

// Of tensors written in place.
inline void check_writable(const Tensor& t, const char* name) {
  for (int64_t i = 0; i < t.dim() && t.numel() > 0; ++i)
    STD_TORCH_CHECK(t.size(i) == 1 || t.stride(i) != 0, name,
                    ": its elements share memory, as an expanded tensor's do; clone it");
}

// A result with the strides that PyTorch gives one `like` x; where the kernel, which reads x as `beside`, cannot write those,
// it fills a stand-in of its own layout, which `finish` copies.
struct Result {
  Tensor asked, used;
  View view;
  Result(const Tensor& like, const View& beside) : asked(torch::stable::empty_like(like)), used(asked) {
    auto v = try_view(used, "result");
    // A single pixel is a plane in any layout.
    const auto fits = [&] { return v && (same_kind(*v, beside) || (beside.s == 1 && spatial(like) <= 1)); };
    if (!fits()) used = torch::stable::new_empty(like, like.sizes()), v = try_view(used, "result");
    STD_TORCH_CHECK(fits() || used.numel() == 0, "result: its layout is not x's");
    view = *v;
  }
  Tensor finish() { return used.get() == asked.get() ? asked : torch::stable::copy_(asked, used); }
};

}  // namespace fastdiff
