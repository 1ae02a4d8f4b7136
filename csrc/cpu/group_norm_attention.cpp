// group_norm_attention, a sample at a time, pixels in the lanes throughout. Formula: fastdiff/ops/group_norm_attention.py.
//
// normalised x -> panels; W_qkv times these -> q in panels, k packed, v in rows; k times q -> scores [keys, kLanes queries],
// whose softmax runs down the rows; v times these -> a in panels; W_out times these, bias, residual -> y.
#ifndef FASTDIFF_ISA

#include "cpu/group_norm_attention.h"

#include <limits>
#include <numeric>
#define FASTDIFF_KERNELS "cpu/group_norm_attention.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void group_norm_attention(const GroupNormAttention& a) { FASTDIFF_DISPATCH(group_norm_attention, a); }
bool takes_bfloat16(Dtype x, int64_t c, int64_t d) {
  return x == Dtype::bf16 && c % 2 == 0 && d % 2 == 0 && isa.load(std::memory_order_relaxed) == 3;
}
}  // namespace fastdiff

#else

#include "cpu/group_norm.h"
#include "cpu/product.h"
#include "cpu/group_norm_attention_sample.h"

// ---- q, k, v

template <class Op>
FD_INLINE void keep(const Sample<Op>& m, const Tile<Op>& t, int64_t part, int64_t head, int64_t f, int rows, int64_t block) {
  typedef typename Op::Word Word;
  constexpr int N = Tile<Op>::N, lanes = kLanes<Op>;
  for (int i = 0; i < rows; i += part == 2 ? 1 : Op::step) {
    const int64_t r = (f + i) / Op::step;
    if (part == 2) {
      for (int j = 0; j < kVectors; ++j) store(m.v(head * m.d * Op::step + f + i) + block * lanes + j * N, t.sum[i][j]);
    } else if (part == 0) {
      for (int j = 0; j < kVectors; ++j) store(m.q(head, block, r) + j * N, t.word(i, j));
    } else {
      Word keys[lanes];
      for (int j = 0; j < kVectors; ++j) store(keys + j * N, t.word(i, j));
      if constexpr (lanes % kTileRows == 0)
        for (int p = 0; p < lanes; p += kTileRows)
          __builtin_memcpy(m.k(head, (block * lanes + p) / kTileRows, r), keys + p, kTileRows * sizeof(Word));
      else
        for (int p = 0; p < lanes; ++p)
          m.k(head, (block * lanes + p) / kTileRows, r)[(block * lanes + p) % kTileRows] = keys[p];
    }
  }
}

// Rows [begin, end) of the tiles of W_qkv, each times every panel of x.
template <class Op> void project_in(const GroupNormAttention& a, const Sample<Op>& m, int64_t begin, int64_t end) {
  typedef Acc<typename Op::Word> A;
  const int64_t per = (a.d + kTileRows - 1) / kTileRows;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / per % a.heads, part = task / per / a.heads, f = task % per * kTileRows;
    const int rows = at_most(a.d - f, kTileRows);
    const int64_t channel = (part * a.heads + head) * a.d + f;
    const auto* weight = static_cast<const typename Op::Stored*>(a.qkv_weight) + channel * a.norm.c;
    const A* bias = a.qkv_bias ? static_cast<const A*>(a.qkv_bias) + channel : nullptr;
    for (int64_t block = 0; block < m.blocks; ++block) {
      Tile<Op> t;
      t.template product<false>(weight, a.norm.c, rows, m.panel(m.c, block), m.c);
      if (bias)
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < kVectors; ++j) t.sum[i][j] += splat<typename Op::V>(bias[i]);
      keep(m, t, part, head, f, rows, block);
    }
  }
}

// ---- attention

// kLanes queries of one head. scores: [s, kLanes].
template <class Op>
void attend(const GroupNormAttention& a, const Sample<Op>& m, int64_t head, int64_t block, typename Op::Word* scores) {
  typedef typename Op::V V;
  constexpr int N = Tile<Op>::N, lanes = kLanes<Op>;
  const V scale = splat<V>(static_cast<typename Op::Word>(a.scale));
  V top[kVectors], total[kVectors] = {};
  for (int j = 0; j < kVectors; ++j) top[j] = splat<V>(-std::numeric_limits<typename Op::Word>::infinity());
  for (int64_t key = 0; key < m.s; key += kTileRows) {
    Tile<Op> t;
    t.template product<true>(reinterpret_cast<const typename Op::Stored*>(m.k(head, key / kTileRows)), 0, 0,
                             m.q(head, block), m.d);
    const int rows = at_most(m.s - key, kTileRows);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < kVectors; ++j) {
        const V score = t.sum[i][j] * scale;
        top[j] = score > top[j] ? score : top[j];
        store(scores + (key + i) * lanes + j * N, score);
      }
  }
  for (int64_t run = 0; run < m.s; run += kRun) {
    const int64_t last = run + kRun < m.s ? run + kRun : m.s;
    V part[kVectors] = {};
    for (int64_t key = run; key < last; key += Op::step)
      for (int j = 0; j < kVectors; ++j) {
        const auto* at = scores + key * lanes + j * N;
        const V first = exponential(load(at) - top[j]);
        V second = V{};
        if (Op::step == 2 && key + 1 < m.s) second = exponential(load(at + lanes) - top[j]);
        part[j] += first + second;
        store(scores + key / Op::step * lanes + j * N, Op::word(first, second));
      }
    for (int j = 0; j < kVectors; ++j) total[j] += part[j];
  }
  for (int j = 0; j < kVectors; ++j) total[j] = 1 / total[j];
  for (int64_t f = 0; f < a.d; f += kTileRows) {
    const int rows = at_most(a.d - f, kTileRows);
    Tile<Op> t;
    t.template product<false>(m.v(head * a.d + f), m.row, rows, scores, (m.s + Op::step - 1) / Op::step);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < kVectors; ++j) t.sum[i][j] *= total[j];
    for (int i = 0; i < rows; i += Op::step)
      for (int j = 0; j < kVectors; ++j) store(m.panel(m.e, block, head * m.d + (f + i) / Op::step) + j * N, t.word(i, j));
  }
}

// ---- y

// Channels that are projected together: whole tiles and whole vectors.
template <class Op> constexpr int kTogether = std::lcm(kTileRows, Tile<Op>::N);

// y = (x + values) scale of `channels` channels from c on; values [channels, kLanes].
template <class T, class Op>
FD_INLINE void finish(const GroupNormAttention& a, int64_t n, int64_t c, int channels, int64_t block,
                      const typename Op::Word* values) {
  typedef typename Op::V V;
  constexpr int N = Tile<Op>::N, lanes = kLanes<Op>;
  const GroupNormSilu& g = a.norm;
  const V scale = splat<V>(static_cast<Acc<T>>(a.out_scale));
  const auto one = [&](const T* x, T* y, V v, int count) __attribute__((always_inline)) {
    if (count == N) store(y, (load(x) + v) * scale);
    else store_some(y, (load_some(x, count) + v) * scale, count);
  };
  for (int j = 0; j < kVectors; ++j) {
    const int64_t p = block * lanes + j * N;
    const int pixels = at_most(g.s - p, N);
    if (pixels <= 0) return;
    if (g.x.s == 1) {
      for (int i = 0; i < channels; ++i)
        one(g.x.at<const T>(n, c + i, p), g.y.at<T>(n, c + i, p), load(values + i * lanes + j * N), pixels);
      continue;
    }
    for (int first = 0; first < channels; first += N) {
      V r[N];
      for (int i = 0; i < N; ++i) r[i] = load(values + (first + i) * lanes + j * N);
      transpose<typename Op::Word>(r);
      for (int i = 0; i < pixels; ++i)
        one(g.x.at<const T>(n, c + first, p + i), g.y.at<T>(n, c + first, p + i), r[i], at_most(channels - first, N));
    }
  }
}

template <class T, class Op>
void project_out(const GroupNormAttention& a, const Sample<Op>& m, int64_t n, int64_t begin, int64_t end) {
  typedef typename Op::Word Word;
  constexpr int N = Tile<Op>::N, lanes = kLanes<Op>, together = kTogether<Op>;
  const int64_t inner = a.heads * a.d;
  const Word* bias = static_cast<const Word*>(a.out_bias);
  Word values[together * lanes] = {};
  for (int64_t c = begin * together; c < a.norm.c && c < end * together; c += together) {
    const int channels = at_most(a.norm.c - c, together);
    const auto* weight = static_cast<const typename Op::Stored*>(a.out_weight) + c * inner;
    for (int64_t block = 0; block < m.blocks; ++block) {
      for (int first = 0; first < channels; first += kTileRows) {
        const int rows = at_most(channels - first, kTileRows);
        Tile<Op> t;
        t.template product<false>(weight + first * inner, inner, rows, m.panel(m.e, block), m.e);
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < kVectors; ++j)
            store(values + (first + i) * lanes + j * N,
                  t.sum[i][j] + splat<typename Op::V>(bias ? bias[c + first + i] : Word(0)));
      }
      finish<T, Op>(a, n, c, channels, block, values);
    }
  }
}

template <class T, class Op> void run(const GroupNormAttention& a) {
  typedef Acc<T> A;
  const GroupNormSilu& g = a.norm;
  Sample<Op> sizes(a);
  const int64_t tiles_in = 3 * a.heads * ((a.d + kTileRows - 1) / kTileRows),
      tiles_out = (g.c + kTogether<Op> - 1) / kTogether<Op>;
  const int64_t table_at = sizes.bytes + aligned(pieces_of(g) * 2 * g.c * 8);
  // A sample a thread where there are enough samples, else a sample after the other by all threads; same sums either way.
  const bool inner = g.n < threads();
  const auto spread = [&](int64_t count, int64_t elements, auto body) {
    inner ? parallel_for(count, grain_of(elements), body) : body(int64_t(0), count);
  };
  const auto samples = [&](int64_t begin, int64_t end) {
    const Scratch memory(table_at + ChannelTable<A>::bytes(g.c));
    double* moments = reinterpret_cast<double*>(memory.data + sizes.bytes);
    const ChannelTable<A> table(memory.data + table_at, g.c);
    Sample<Op> m = sizes;
    m.memory = memory.data;
    for (int64_t n = begin; n < end; ++n) {
      maps<T>(g, n, moments, table, spread);
      spread(m.blocks, m.lanes * g.c, [&](int64_t i, int64_t j) {
        for (; i < j; ++i) g.x.s == 1 ? pack_planes<T>(g, n, table, m, i) : pack_rows<T>(g, n, table, m, i);
      });
      spread(tiles_in, kTileRows * g.s * g.c, [&](int64_t i, int64_t j) { project_in(a, m, i, j); });
      spread(a.heads * m.blocks, m.lanes * g.s * a.d, [&](int64_t i, int64_t j) {
        const Scratch scores((g.s + 1) * m.lanes * sizeof(typename Op::Word));
        for (; i < j; ++i) attend(a, m, i / m.blocks, i % m.blocks, reinterpret_cast<typename Op::Word*>(scores.data));
      });
      spread(tiles_out, kTogether<Op> * g.s * a.heads * a.d, [&](int64_t i, int64_t j) { project_out<T>(a, m, n, i, j); });
    }
  };
  inner ? samples(0, g.n) : parallel_for(g.n, 1, samples);
}

inline void group_norm_attention(const GroupNormAttention& a) {
#if FASTDIFF_LEVEL >= 3
  if (takes_bfloat16(a.norm.x.dtype, a.norm.c, a.d)) return run<bfloat16, Pairs>(a);
#endif
  with_dtype(a.norm.x.dtype, [&](auto t) { run<decltype(t), Plain<Acc<decltype(t)>>>(a); });
}

#endif
