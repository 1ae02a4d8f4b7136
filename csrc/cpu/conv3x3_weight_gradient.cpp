// The gradient of conv3x3's weights by Winograd's algorithm: the transpose of F(4x4, 3x3) in its weights,
//
//     dw[o, i] = G^T [ sum over tiles of (A dy[o] A^T) (B^T h[i] B) ] G, products element by element,
//
// 36 multiplications for 144 of the direct sum. A slab of tiles at a time: V = B^T h B and M = A dy A^T of it, each row of
// points in the order in which it is read; then for W input and kOutputs output channels the sums over the slab's tiles, a
// row of points in registers, and G^T of them before they leave. A sum's order depends on the shape alone, not on threads.
#ifndef FASTDIFF_ISA

#include "cpu/conv3x3_weight_gradient.h"

#define FASTDIFF_KERNELS "cpu/conv3x3_weight_gradient.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void conv3x3_weight_gradient(const Conv3x3& a, float* dw) {
#define FASTDIFF_ARGUMENTS a, dw
  FASTDIFF_DISPATCH(conv3x3_weight_gradient, FASTDIFF_ARGUMENTS);
}
}  // namespace fastdiff

#else

#include "cpu/group_norm.h"

#include "cpu/conv3x3_transforms.h"

#include "cpu/conv3x3_product.h"

#include "cpu/conv3x3_image.h"

#include "cpu/conv3x3_tiles.h"

constexpr int kOutputs = FASTDIFF_LEVEL >= 2 ? 4 : 2;  // output channels at once: 24 sums in 32 registers, or 12 in 16
constexpr int64_t kOutputBlock = 64;                   // output channels whose M stays in L2

struct Columns {
  typedef float Stored;
  static constexpr Order kOrder = Order::columns;
  static constexpr int step = 1, kGroup = 1;
  static constexpr bool kScaled = false;
  static FD_INLINE void keep(float* p, vf v, int64_t) { store(p, v); }
};

template <class T_> struct Learning : Tiles<T_, Four, Columns> {
  typedef Tiles<T_, Four, Columns> Base;
  using typename Base::T, typename Base::Scheme;
  using Base::Base, Base::kIn, Base::kOut, Base::a, Base::rows, Base::cols, Base::wide_o, Base::plane, Base::v;
  using Base::kChannels;

  float* m = nullptr;  // [kIn rows of points][wide_o / kOutputs][tiles of a slab][kIn][kOutputs]
  float* dw = nullptr;

  int64_t m_row() const { return this->slab_tiles() * wide_o * kIn + kLine; }
  float* m_of(int p, int64_t o, int64_t tile) const {
    return m + p * m_row() + (o / kOutputs * this->slab_tiles() + tile) * kIn * kOutputs;
  }

  // M of one tile, a vector of output channels: `tile` is its number in the slab.
  void tile_back(int64_t n, int64_t r, int64_t t, int64_t o, int64_t tile) const {
    const int some = static_cast<int>(least(W, a.o - o));
    const int64_t height = least(kOut, a.h - r * kOut), breadth = least(kOut, a.w - t * kOut);
    const T* dy = a.residual.template at<const T>(n, o, r * kOut * a.w + t * kOut);
    vf y[kOut][kOut], half[kOut][kIn];
    for (int j = 0; j < kOut; ++j) {
      for (int i = 0; i < kOut; ++i)
        y[j][i] = i < height && j < breadth ? load_some(dy + (i * a.w + j) * a.residual.s, some) : vf{};
      Scheme::output_back(y[j], half[j]);
    }
    for (int p = 0; p < kIn; ++p) {
      vf d[kOut], made[kIn];
      for (int j = 0; j < kOut; ++j) d[j] = half[j][p];
      Scheme::output_back(d, made);
      for (int l = 0; l < W / kOutputs; ++l) {
        float* to = m_of(p, o + l * kOutputs, tile);
        for (int q = 0; q < kIn; ++q)
          for (int k = 0; k < kOutputs; ++k) to[q * kOutputs + k] = made[q][l * kOutputs + k];
      }
    }
  }

  // G^T of a row of points: red [3][kOutputs] = sums over `tiles` tiles of x [tiles, kIn, W] times d [tiles, kIn, kOutputs].
  static __attribute__((noinline)) void row_of_points(const float* x, const float* d, int64_t tiles, vf* red) {
    vf sum[kOutputs][kIn];
    each<kOutputs>([&](int k) __attribute__((always_inline)) {
      each<kIn>([&](int q) __attribute__((always_inline)) { sum[k][q] = vf{}; });
    });
    for (int64_t t = 0; t < tiles; ++t, x += kIn * W, d += kIn * kOutputs)
      each<kIn>([&](int q) __attribute__((always_inline)) {
        const vf b = load(x + q * W);
        each<kOutputs>([&](int k) __attribute__((always_inline)) {
          sum[k][q] = fma(splat<vf>(d[q * kOutputs + k]), b, sum[k][q]);
        });
      });
    each<kOutputs>([&](int k) __attribute__((always_inline)) { Scheme::filter_back(sum[k], red + 3 * k); });
  }

  // dw of kOutputs output and W input channels from o and c on, of `tiles` tiles; added to what is there.
  void learn(int64_t o, int64_t c, int64_t tiles, bool more) const {
    vf red[kIn][kOutputs][3];
    for (int p = 0; p < kIn; ++p) row_of_points(this->place(p, 0, c), m_of(p, o, 0), tiles, &red[p][0][0]);
    const int some = static_cast<int>(least(W, a.norm.c - c));
    for (int k = 0; k < kOutputs && o + k < a.o; ++k)
      for (int column = 0; column < 3; ++column) {
        vf u[kIn], g[3];
        for (int p = 0; p < kIn; ++p) u[p] = red[p][k][column];
        Scheme::filter_back(u, g);
        for (int row = 0; row < 3; ++row) {
          float* out = dw + ((o + k) * 9 + 3 * row + column) * a.norm.c + c;
          store_some(out, more ? g[row] + load_some(out, some) : g[row], some);
        }
      }
  }

  void run(float* out) {
    dw = out;
    const int64_t v_bytes = aligned(kIn * kIn * plane * 4), blocks = parts(a.o, kOutputBlock), columns = parts(a.norm.c, W);
    char* memory = kept_memory(0, v_bytes + kIn * m_row() * 4);
    v = reinterpret_cast<float*>(memory), m = reinterpret_cast<float*>(memory + v_bytes);
    for (int64_t i = 0; i < this->slabs(); ++i) {
      const auto [first, last] = this->slab(i);
      const int64_t height = last - first, tiles = height * cols, start = first;
      parallel_for(parts(a.norm.c, kChannels), 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) this->into(start, 0, height, c * kChannels);
      });
      parallel_for(parts(a.o, W), 1, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; ++o)
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = start + tile / cols;
            tile_back(row / rows, row % rows, tile % cols, o * W, tile);
          }
      });
      parallel_for(blocks * columns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t o = task / columns * kOutputBlock, limit = least(a.o, o + kOutputBlock);
          for (int64_t k = o; k < limit; k += kOutputs) learn(k, task % columns * W, tiles, i > 0);
        }
      });
    }
  }
};

inline void conv3x3_weight_gradient(const Conv3x3& a, float* dw) {
  with_dtype(a.norm.x.dtype, [&](auto t) {
    typedef decltype(t) T;
    if constexpr (!std::is_same_v<T, double>) Learning<T>(a).run(dw);
  });
}

#endif
