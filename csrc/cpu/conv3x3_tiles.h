// An image's tiles, all of one size, and their way into the transformed domain. Include inside a kernel file, after
// conv3x3_image.h.

constexpr int64_t kSlab = 64;  // tiles of a slab, at least a row of them: V stays in L2 or near it

template <class T_, class Scheme_, class Op_> struct Tiles : Images<T_, Op_> {
  typedef Images<T_, Op_> Base;
  typedef Scheme_ Scheme;
  using typename Base::Op, typename Base::T;
  typedef typename Op::Stored Stored;
  using Base::a, Base::width, Base::words, Base::wide_o, Base::breadth, Base::kChannels;
  static constexpr int kIn = Scheme::kIn, kOut = Scheme::kOut, kPoints = kIn * kIn;

  const int64_t rows, cols;   // tiles of an image
  int64_t slab_rows, images;  // of a slab: rows of tiles, of how many images (1 where an image has several slabs)
  int64_t plane;              // stored elements of one of V's matrices, odd in cache lines
  Stored* v = nullptr;

  explicit Tiles(const Conv3x3& a_)
      : Base(a_, parts(a_.w, kOut) * kOut + 2), rows(parts(a_.h, kOut)), cols(parts(a_.w, kOut)) {
    const int64_t fit = most(1, kSlab / cols);
    images = rows >= fit ? 1 : least(fit / rows, a.norm.n);
    slab_rows = rows > fit ? parts(rows, parts(rows, fit)) : rows;
    plane = parts(slab_tiles(), Op::kGroup) * Op::kGroup * width + 128 / static_cast<int64_t>(sizeof(Stored));
    if constexpr (Op::kScaled) this->factors = units() + wide_o;
  }

  // Where V has point (p, 0) of a tile, from channel c on; its next point is next_point() further. Matrices [tiles, width]
  // one after the other, or as multiply_filters or a weight's gradient take them.
  Stored* place(int p, int64_t tile, int64_t c) const {
    Stored* row = v + p * kIn * plane;
    if constexpr (Op::kOrder == Order::groups)
      return row + (tile / Op::kGroup * width + c) * Op::kGroup * kIn + tile % Op::kGroup * kIn * kLanes;
    else if constexpr (Op::kOrder == Order::columns)
      return row + (c / W * slab_tiles() + tile) * kIn * W;
    else if constexpr (Op::kOrder == Order::chunks)
      return row + (c / kShared * slab_tiles() + tile) * kShared + c % kShared;
    else
      return row + tile * width + c;
  }
  int64_t next_point() const {
    return Op::kOrder == Order::groups ? kLanes : Op::kOrder == Order::columns ? W : plane;
  }

  // What integers of V are multiplied by: [chunks of kShared channels, kIn, slab_tiles()], behind V.
  float* scales(int64_t c, int p, int64_t tile) const {
    return reinterpret_cast<float*>(v + kPoints * plane) + (c / kShared * kIn + p) * slab_tiles() + tile;
  }
  int64_t v_bytes() const {
    const int64_t scales = Op::kScaled ? parts(width, kShared) * kIn * slab_tiles() : 0;
    return aligned(kPoints * plane * static_cast<int64_t>(sizeof(Stored)) + scales * 4);
  }

  // Behind the weights of integers: units of the output channels, then factors of the input channels.
  const float* units() const { return static_cast<const float*>(a.packed) + kPoints * words * wide_o; }

  // A slab's rows of tiles, counted through the batch.
  struct Rows {
    int64_t first, last;
  };
  int64_t slab_tiles() const { return images * slab_rows * cols; }
  int64_t slabs() const { return images > 1 ? parts(a.norm.n, images) : a.norm.n * parts(rows, slab_rows); }
  Rows slab(int64_t i) const {
    if (images > 1) return {i * images * rows, least(a.norm.n * rows, (i + 1) * images * rows)};
    const int64_t per_image = parts(rows, slab_rows), first = i / per_image * rows + i % per_image * slab_rows;
    return {first, least((i / per_image + 1) * rows, first + slab_rows)};
  }

  // One row of tiles of the padded image: down its columns into `down` [kIn, breadth, kChannels], then along the rows
  // into V, where the row's first tile is number `tile`.
  void transform_in(const float* image, float* down, int64_t c, int64_t tile) const {
    const int64_t line = breadth * kChannels;
    for (int64_t i = 0; i < line; i += W) {
      vf d[kIn], r[kIn];
      each<kIn>([&](int p) __attribute__((always_inline)) { d[p] = load(image + p * line + i); });
      Scheme::input(d, r);
      each<kIn>([&](int p) __attribute__((always_inline)) { store(down + p * line + i, r[p]); });
    }
    const int64_t next = next_point(), used = least(kChannels / W, parts(a.norm.c - c, W));
    for (int p = 0; p < kIn; ++p)
      for (int64_t t = 0; t < cols; ++t) {
        const float* from = down + p * line + t * kOut * kChannels;
        if constexpr (Op::kScaled) *scales(c, p, tile + t) = integers(from, place(p, tile + t, c), next);
        else for (int64_t j = 0; j < used; ++j) {
          vf d[kIn], r[kIn];
          each<kIn>([&](int q) __attribute__((always_inline)) { d[q] = load(from + q * kChannels + j * W); });
          Scheme::input(d, r);
          Stored* to = place(p, tile + t, c + j * W);
          each<kIn>([&](int q) __attribute__((always_inline)) { Op::keep(to + q * next, r[q], kIn * Op::kGroup * kLanes); });
        }
      }
  }

  // One tile and row of points as integers of a unit, which is returned: the largest value is kLargest. NaN where a value is
  // not finite, so that all of the tile's results are.
  static float integers(const float* from, Stored* to, int64_t next) {
    constexpr int vectors = kChannels / W;
    vf r[vectors][kIn];
    vi top = {};
    each<vectors>([&](int j) __attribute__((always_inline)) {
      vf d[kIn];
      each<kIn>([&](int q) __attribute__((always_inline)) { d[q] = load(from + q * kChannels + j * W); });
      Scheme::input(d, r[j]);
      each<kIn>([&](int q) __attribute__((always_inline)) {
        const vi size = reinterpret_cast<vi>(r[j][q]) & 0x7fffffff;  // as floats, and NaN above infinity
        top = size > top ? size : top;
      });
    });
    const float most = __builtin_bit_cast(float, largest(top)), unit = most * (1 / Op::kLargest);
    const bool finite = most - most == 0;
    const vf per_one = splat<vf>(finite && most > 1e-30f ? Op::kLargest / most : 0.0f);
    each<vectors>([&](int j) __attribute__((always_inline)) {
      each<kIn>([&](int q) __attribute__((always_inline)) { Op::keep(to + q * next + j * W, r[j][q] * per_one, 0); });
    });
    return finite ? unit : __builtin_nanf("");
  }

  // Channels c ... of the tile rows [begin, end) of a slab whose first row of tiles is number `first` of the batch.
  void into(int64_t first, int64_t begin, int64_t end, int64_t c) const {
    float* down = reinterpret_cast<float*>(kept_memory(1, (kIn + slab_rows * kOut + 2) * breadth * kChannels * 4));
    float* image = down + kIn * breadth * kChannels;
    for (int64_t row = begin; row < end;) {
      const int64_t n = (first + row) / rows, r = (first + row) % rows, count = least(end - row, rows - r);
      this->fill(n, c, r * kOut - 1, count * kOut + 2, image);
      for (int64_t i = 0; i < count; ++i)
        transform_in(image + i * kOut * breadth * kChannels, down, c, (row + i) * cols);
      row += count;
    }
  }
};
