// denoise_step on CUDA: a thread's share of the image from device memory once and back once, the row's coefficients read on
// the device. Formula: fastdiff/ops/denoise_step.py.
#include "cuda/denoise_step.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/philox.cuh"

namespace fastdiff {
namespace {

struct Lies { Lie x, saved, f, f_u, v, net_in, history; };

__device__ float clip(float d) { return d < -1 ? -1 : d > 1 ? 1 : d; }  // NaN stays
__device__ double clip(double d) { return d < -1 ? -1 : d > 1 ? 1 : d; }

// e^x: a power of two, and Cephes' expf on the rest; the multiplies and adds round by themselves like the noise's.
__device__ float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float n = __fadd_rn(mul_add(x, 1.44269504088896341f, 12582912.0f), -12582912.0f);  // nearest integer
  const float r = mul_add(n, 2.12194440e-4f, mul_add(n, -0.693359375f, x));
  constexpr float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                         5.0000001201e-1f};
  const float p = __fadd_rn(mul_add(polynomial(c, r), __fmul_rn(r, r), r), 1.0f);
  return __fmul_rn(p, __int_as_float((__float2int_rn(n) + 127) << 23));
}
__device__ double exponential(double x) { return exp(x); }

// out += amount * values
template <int C, int E, class A> __device__ void accumulate(A (&out)[C][E], A amount, const A (&values)[C][E]) {
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int i = 0; i < E; ++i) out[c][i] = mul_add(amount, values[c][i], out[c][i]);
}

// out += amount[...] * z, in whole Philox blocks.
template <int C, int E, class A, class Amount>
__device__ void add_noise(A (&out)[C][E], const Stream& s, const Place& at, const Amount& amount) {
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int i = 0; i < E; i += 4) {
      float z[4];
      normals(s, static_cast<uint64_t>((c * at.pixels) + at.first + i) / 4, z);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[c][i + j] = mul_add(amount(c, i + j), A(z[j]), out[c][i + j]);
    }
}

__device__ View slot(const DenoiseStep& a, int j) {
  View v = a.history;
  v.data = static_cast<char*>(v.data) + j * a.slot_stride * (v.dtype == Dtype::f64 ? 8 : 4);
  return v;
}

// C = 1: a share is E elements in logical order. C = 3: E pixels of three channels, of tensors some
// of which are channels-last.
template <int C, int E, class A, class T>
__global__ void __launch_bounds__(256) step(DenoiseStep a, Lies lie) {
  begin();
  const int64_t end = C == 1 ? a.c * a.s : a.s, stride = int64_t{gridDim.x} * blockDim.x * E;
  for (Place at{blockIdx.y, 0, end, a.s}; at.sample < a.n; at.sample += gridDim.y) {
    const int64_t row = a.row[a.row_per_sample ? at.sample : 0];
    const bool known = row >= 0 && row < a.rows;
    const A* c = static_cast<const A*>(a.coefficients) + (known ? row : 0) * column::kCount;
    const int32_t* k = a.codes + (known ? row : 0) * code::kCount;
    const A of_x = known ? c[column::kX] : A(__int_as_float(0x7FC00000)), of_d = c[column::kD], of_clip = c[column::kDClip];
    const A n_1 = c[column::kN1], n_2 = c[column::kN2], n_v = a.v.data ? c[column::kNV] : A(0);
    const int32_t keep = a.f.data && known && k[code::kSaveD] < a.slots ? k[code::kSaveD] : -1;
    const bool evaluated = a.f.data && (of_d != 0 || of_clip != 0 || keep >= 0);
    const A guide = a.f_u.data ? mul_add(c[column::kGuide],
                                         static_cast<const A*>(a.guidance)[a.guidance_per_sample ? at.sample : 0],
                                         -c[column::kGuide])
                               : A(0);
    const int64_t seed = a.seeds[at.sample];

    for (at.first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * E; at.first < end; at.first += stride) {
      A x[C][E], out[C][E], other[C][E];
      read<C, E, A>(a.x, lie.x, at, x);
#pragma unroll
      for (int i = 0; i < C * E; ++i) out[i / E][i % E] = x[i / E][i % E] * of_x;
      // Before D is kept: a slot may be read and written in the same row.
      for (int j = 0; j < kHistory && j < a.slots; ++j)
        if (c[column::kH0 + j] != 0) {
          read<C, E, A>(slot(a, j), lie.history, at, other);
          accumulate(out, c[column::kH0 + j], other);
        }
      if (a.saved.data && c[column::kSaved] != 0) {
        read<C, E, A>(a.saved, lie.saved, at, other);
        accumulate(out, c[column::kSaved], other);
      }
      if (evaluated) {
        A f[C][E];
        read<C, E, T>(a.f, lie.f, at, f);
        if (guide != 0) {
          read<C, E, T>(a.f_u, lie.f_u, at, other);
#pragma unroll
          for (int i = 0; i < C * E; ++i)
            f[i / E][i % E] = mul_add(guide, f[i / E][i % E] - other[i / E][i % E], f[i / E][i % E]);
        }
        const A skip = c[column::kSkip], of_f = c[column::kOut];
        const bool clipped = k[code::kSaveClipped] == 1;
#pragma unroll
        for (int i = 0; i < C * E; ++i) {
          const A d = mul_add(skip, x[i / E][i % E], of_f * f[i / E][i % E]), dc = clip(d);
          out[i / E][i % E] = mul_add(of_d, d, mul_add(of_clip, dc, out[i / E][i % E]));
          f[i / E][i % E] = clipped ? dc : d;
        }
        if (keep >= 0) write<C, E, A>(slot(a, keep), lie.history, at, f);
      }
      if (a.saved.data && known && k[code::kSaveX] == 1) write<C, E, A>(a.saved, lie.saved, at, x);
      if (n_v != 0) {
        const A low = c[column::kLogMin], high = c[column::kLogMax];
        read<C, E, T>(a.v, lie.v, at, other);
#pragma unroll
        for (int i = 0; i < C * E; ++i)
          other[i / E][i % E] =
              mul_add(n_v, exponential(mul_add(other[i / E][i % E], (high - low) / 4, (high + low) / 4)), n_1);
      } else {
#pragma unroll
        for (int i = 0; i < C * E; ++i) other[i / E][i % E] = n_1;
      }
      if (n_1 != 0 || n_v != 0)
        add_noise(out, stream_of(seed, k[code::kDraw1], kDomainStep), at, [&](int ch, int i) { return other[ch][i]; });
      if (n_2 != 0) add_noise(out, stream_of(seed, k[code::kDraw2], kDomainStep), at, [&](int, int) { return n_2; });
      write<C, E, A>(a.x, lie.x, at, out);
      const A next_in = c[column::kNextIn];
#pragma unroll
      for (int i = 0; i < C * E; ++i) out[i / E][i % E] *= next_in;
      Place to = at;
#pragma unroll 1  // one copy or two; see add_noise.cu
      for (int64_t copy = 0; copy < a.copies; ++copy, to.sample += a.n) write<C, E, T>(a.net_in, lie.net_in, to, out);
    }
  }
}

bool together(const Lies& l) {
  for (Lie each : {l.x, l.saved, l.f, l.f_u, l.v, l.net_in, l.history})
    if (each == Lie::apart) return false;
  return true;
}

Lies lies_of(const DenoiseStep& a, int channels, int elements) {
  const bool whole = (channels == 1 ? a.c * a.s : a.s) % elements == 0;
  const auto of = [&](const View& t) { return t.data ? lie_of(t, a.c, a.s, channels, elements, whole) : Lie::run; };
  Lies l{of(a.x), of(a.saved), of(a.f), of(a.f_u), of(a.v), of(a.net_in), of(a.history)};
  if (a.slot_stride % 4) l.history = Lie::apart;
  return l;
}

template <class A, class T> cudaError_t queue(const DenoiseStep& a, cudaStream_t stream) {
  constexpr int E = sizeof(T) == 2 ? 8 : 4;  // of three channels 4: with 8 the registers of one block fill a multiprocessor
  const Lies alone = lies_of(a, 1, E), three = lies_of(a, 3, 4);
  if constexpr (std::is_same_v<A, float>)
    if (!together(alone) && a.c == 3 && together(three))
      return launch<step<3, 4, A, T>>({grid_of(a.s / 4, a.n), 256, stream}, a, three);
  return launch<step<1, E, A, T>>({grid_of((a.c * a.s + E - 1) / E, a.n), 256, stream}, a, alone);
}

}  // namespace

const char* denoise_step_cuda(const DenoiseStep& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.net_in.dtype) {
    case Dtype::f32: return text_of(queue<float, float>(a, s));
    case Dtype::bf16: return text_of(queue<float, __nv_bfloat16>(a, s));
    case Dtype::f16: return text_of(queue<float, __half>(a, s));
    case Dtype::f64: return text_of(queue<double, double>(a, s));
  }
  return text_of(cudaErrorInvalidValue);
}

}  // namespace fastdiff
