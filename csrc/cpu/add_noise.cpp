// add_noise: K linear forms in (x0, n), the noise made once a tile and never stored. Formula: fastdiff/ops/add_noise.py.
#ifndef FASTDIFF_ISA

#include "cpu/add_noise.h"
#include "philox.h"
#define FASTDIFF_KERNELS "cpu/add_noise.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void add_noise(const AddNoise& a) { FASTDIFF_DISPATCH(add_noise, a); }
}  // namespace fastdiff

#else

#include "cpu/noise.h"
#include "cpu/tile.h"

template <class A> void noise_forms(const AddNoise& a) {
  const bool run = is_flat(a.x0, a.c, a.s);
  const View x0 = run ? as_run(a.x0) : a.x0;
  const Tiling tiling(a.c, a.s, run ? Walk::run : Walk::tiles);
  const int64_t room = tiling.channels * tiling.length;
  parallel_for(a.n * tiling.count, 4, [&](int64_t begin, int64_t end) {
    const Scratch memory(room * (2 * sizeof(A) + sizeof(float)));
    A *x_tile = reinterpret_cast<A*>(memory.data), *result = x_tile + room;
    float* z = reinterpret_cast<float*>(result + room);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / tiling.count, tile = task % tiling.count, first = tile * tiling.length;
      const int64_t length = tiling.length_of(tile), size = tiling.channels * length;
      const A* x = read_tile(x0, tiling, n, first, length, x_tile);
      noise_tile(stream_of(a.seeds[n], a.draw, a.domain), tiling, first, length, z, nullptr);
      for (int64_t k = 0; k < a.k; ++k) {
        const A* c = static_cast<const A*>(a.coefficients) + 2 * (n * a.k + k);
        const A of_x = c[0], of_z = c[1];
        for (int64_t i = 0; i < size; ++i) result[i] = of_x * x[i] + of_z * z[i];
        const View out{a.out, a.c * a.s, run ? 0 : a.s, 1, a.x0.dtype};
        write_tile(out, tiling, k * a.n + n, first, length, static_cast<const A*>(result));
      }
    }
  });
}

inline void add_noise(const AddNoise& a) { a.x0.dtype == Dtype::f64 ? noise_forms<double>(a) : noise_forms<float>(a); }

#endif
