// One LSTM layer over whole sequences, forward and backward, in float32 on a CPU.
//
// XLA would run each time step as several small products and loops with memory between them. Here
// a step's two products and everything after them happen in registers, tile by tile, and each
// core keeps its share of the weights in its own cache from the first step to the last.
//
// Arrays are dense and in C order: x [batch, time, features], outputs and cells [batch, time,
// hidden], gates [batch, time, 4 * hidden] with i, f, g, o side by side, as everywhere.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

namespace ffi = xla::ffi;

namespace {

// ---- Vectors: as wide as the processor's registers, and a tile that fills the registers.

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 6;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 3;
#else
constexpr int kLanes = 4, kTileRows = 6;
#endif
constexpr int kColumns = 4 * kLanes;  // of a tile, and of a panel of packed weights

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

typedef float AnyVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec Load(const float* from) { return *reinterpret_cast<const AnyVec*>(from); }

inline Vec Load(const float* from, int count) {
  if (count == kLanes) return Load(from);
  Vec v{};
  std::memcpy(&v, from, 4 * count);
  return v;
}

inline void Store(float* to, Vec v, int count = kLanes) {
  if (count == kLanes) {
    *reinterpret_cast<AnyVec*>(to) = v;
  } else {
    std::memcpy(to, &v, 4 * count);
  }
}

// Store what is not read again soon: around the cache, without reading the memory first.
inline void Stream(float* to, Vec v, int count) {
#if defined(__AVX512F__)
  if (count == kLanes && reinterpret_cast<uintptr_t>(to) % sizeof v == 0) {
    return _mm512_stream_ps(to, (__m512)v);
  }
#elif defined(__AVX__)
  if (count == kLanes && reinterpret_cast<uintptr_t>(to) % sizeof v == 0) {
    return _mm256_stream_ps(to, (__m256)v);
  }
#endif
  Store(to, v, count);
}

// Make streamed stores visible to other threads before what follows.
inline void EndStreams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// e^y - 1 to about an ulp: y = n ln 2 + r, and a Taylor series for r.
inline Vec Expm1(Vec y) {
  const Vec lowest = Vec{} - 87.f, highest = Vec{} + 88.f;
  y = y < lowest ? lowest : y;
  y = y > highest ? highest : y;
  const float to_integer = 12582912.f;  // 1.5 * 2^23: no bits are left for a fraction
  Vec shifted = y * 1.44269504f + to_integer;
  Vec n = shifted - to_integer;
  Vec r = y - n * 0.693359375f - n * -2.12194440e-4f;
  Vec p = r * (1 / 5040.f) + 1 / 720.f;
  p = p * r + 1 / 120.f;
  p = p * r + 1 / 24.f;
  p = p * r + 1 / 6.f;
  p = p * r + 1 / 2.f;
  p = p * (r * r) + r;
  const Vec power = (Vec)(((IntVec)shifted - 0x4B400000 + 127) << 23);  // 2^n, by its bits
  return power * p + (power - 1.f);
}

inline Vec Sigmoid(Vec x) { return 1.f / (Expm1(-x) + 2.f); }

inline Vec Tanh(Vec x) {
  Vec e = Expm1(x + x);
  return e / (e + 2.f);
}

// acc[row][v] += sum over k of rows[row][k] * panel[k][v].
template <int kRows>
inline __attribute__((always_inline)) void Multiply(Vec (&acc)[kRows][4],
                                                    const float* const* rows,
                                                    const float* panel, int64_t depth) {
  const float* a[kRows];
  for (int r = 0; r < kRows; ++r) a[r] = rows[r];
  for (int64_t k = 0; k < depth; ++k, panel += kColumns) {
    Vec w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) w[v] = Load(panel + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] += a[r][k] * w[v];
    }
  }
}

// ---- Threads.

// All of `count` threads wait for the last; they meet after each time step, so they spin.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}

  void Wait() {
    if (count_ == 1) return;
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins > 2000) std::this_thread::yield();
    }
  }

 private:
  const int count_;
  std::atomic<int> arrived_{0}, turn_{0};
};

// Cores that this process may use.
int CountCores() {
#if defined(__linux__)
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return std::max(1, CPU_COUNT(&cores));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

struct Span {
  int64_t begin, end;
};

// The `index`th of `parts` nearly equal parts of 0..size, each a multiple of `unit` but the last.
Span Part(int64_t size, int64_t unit, int parts, int index) {
  const int64_t units = (size + unit - 1) / unit;
  return {std::min(size, units * index / parts * unit),
          std::min(size, units * (index + 1) / parts * unit)};
}

// Hands out the rows of a batch, tile by tile: large shares first, small ones at the end, so that a
// thread that the system starts late, or takes the core from, does less and nobody waits for it.
class Shares {
 public:
  Shares(Span rows, int64_t unit, int threads) : rows_(rows), unit_(unit), threads_(threads) {}

  bool Next(Span* share) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const int64_t units = (rows_.end - rows_.begin + unit_ - 1) / unit_;
    const int64_t mine = threads_ == 1 ? units : (units + 2 * threads_ - 1) / (2 * threads_);
    *share = {rows_.begin, std::min(rows_.end, rows_.begin + mine * unit_)};
    rows_.begin = share->end;
    return share->begin < share->end;
  }

 private:
  std::mutex mutex_;
  Span rows_;
  const int64_t unit_;
  const int threads_;
};

// Calls work(panels, next, barrier) on as many threads as pay. A thread has some of the panels of
// weights, and the rows of the batch that next(&rows) gives it until that is false. Rows need no
// barrier, but each thread that has all panels needs them in its own cache; so where they are too
// large for it, or there are fewer tiles of rows than threads, threads share panels instead. Those
// have the same rows, and a barrier to meet at.
template <typename Work>
void Parallel(int64_t batch, int64_t unit, int64_t panels, int64_t panel_bytes, Work work) {
  constexpr int64_t kCacheBytes = 1 << 22;
  const int threads = CountCores();
  int over_rows = std::min<int64_t>(threads, (batch + unit - 1) / unit);
  int over_panels = std::min<int64_t>(threads / over_rows, panels);
  while (over_rows > 1 && over_panels < panels &&
         panels * panel_bytes / over_panels > kCacheBytes) {
    over_rows = (over_rows + 1) / 2;
    over_panels = std::min<int64_t>(threads / over_rows, panels);
  }
  Shares all({0, batch}, unit, over_rows);
  std::vector<std::unique_ptr<Barrier>> barriers;
  for (int i = 0; i < over_rows; ++i) barriers.push_back(std::make_unique<Barrier>(over_panels));
  auto run = [&](int index) {
    const int row_part = index / over_panels, panel_part = index % over_panels;
    Shares own(Part(batch, unit, over_rows, row_part), unit, 1);
    Shares& shares = over_panels == 1 ? all : own;
    work(Part(panels, 1, over_panels, panel_part), [&](Span* rows) { return shares.Next(rows); },
         *barriers[row_part]);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < over_rows * over_panels; ++i) others.emplace_back(run, i);
  run(0);
  for (auto& other : others) other.join();
}

// Memory for a call, kept for the next one: freshly mapped, it costs more than what is done in it.
class Scratch {
 public:
  explicit Scratch(size_t floats) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (!kept_.empty()) {
      storage_ = std::move(kept_.back());
      kept_.pop_back();
    }
    const size_t vectors = (floats + kLanes - 1) / kLanes;
    if (storage_.size() < vectors) storage_ = std::vector<Vec>(vectors);
  }
  ~Scratch() {
    const std::lock_guard<std::mutex> guard(mutex_);
    kept_.push_back(std::move(storage_));
  }
  float* data() { return reinterpret_cast<float*>(storage_.data()); }

 private:
  static std::mutex mutex_;
  static std::vector<std::vector<Vec>> kept_;
  std::vector<Vec> storage_;
};
std::mutex Scratch::mutex_;
std::vector<std::vector<Vec>> Scratch::kept_;

// Ask for large pages: a fresh array of many small ones costs as much to map as to fill. XLA lays
// its arrays side by side in one fresh block, so the large pages at the ends are asked for too; for
// whoever else has memory there, it is a hint.
void PreferLargePages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  if (bytes < kPage / 4) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct Sizes {
  int64_t batch, time, features, hidden;
};

// ---- Forward.

struct ForwardArrays {
  Sizes size;
  const float *x, *kernel_ih, *kernel_hh, *bias, *h_0, *c_0;
  const int32_t* lengths;
  bool reverse;
  float *outputs, *h_n, *c_n, *gates, *cells;  // the last two may be null
  float* sums = nullptr;  // [batch, time, 4 * hidden] of bias and inputs, where added up ahead
};

// A panel: for each feature and each hidden unit that is multiplied, 4 gates of kLanes units.
void PackForward(const ForwardArrays& a, int64_t panel, float* to) {
  const int64_t hidden = a.size.hidden, unit = panel * kLanes;
  const int count = std::min<int64_t>(kLanes, hidden - unit);
  auto pack_row = [&](const float* row) {
    for (int gate = 0; gate < 4; ++gate, to += kLanes) {
      Store(to, Load(row + gate * hidden + unit, count));
    }
  };
  pack_row(a.bias);
  for (int64_t k = 0; k < a.size.features; ++k) pack_row(a.kernel_ih + k * 4 * hidden);
  for (int64_t k = 0; k < hidden; ++k) pack_row(a.kernel_hh + k * 4 * hidden);
}

// For a batch of less than a tile: the part of the inputs in the sums, for so many rows of batch and
// time at once, so that their weights are not read again at each step.
template <int kRows>
void InputTile(const ForwardArrays& a, int64_t row, int64_t panel, const float* packed) {
  const auto [batch, time, features, hidden] = a.size;
  const float* inputs[kRows];
  for (int r = 0; r < kRows; ++r) inputs[r] = a.x + (row + r) * features;
  Vec acc[kRows][4];
  for (int v = 0; v < 4; ++v) {
    for (int r = 0; r < kRows; ++r) acc[r][v] = Load(packed + v * kLanes);
  }
  Multiply<kRows>(acc, inputs, packed + kColumns, features);
  const int64_t unit = panel * kLanes;
  const int count = std::min<int64_t>(kLanes, hidden - unit);
  for (int r = 0; r < kRows; ++r) {
    float* sums = a.sums + (row + r) * 4 * hidden + unit;
    for (int gate = 0; gate < 4; ++gate) Store(sums + gate * hidden, acc[r][gate], count);
  }
}

template <int kRows>
void ForwardTile(const ForwardArrays& a, int64_t row, int64_t t, int64_t panel,
                 const float* packed) {
  const auto [batch, time, features, hidden] = a.size;
  const float *inputs[kRows], *states[kRows];
  bool any = false;
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = row + r, length = a.lengths[b];
    any |= t < length;
    const bool is_first = a.reverse ? t + 1 >= length : t == 0;
    inputs[r] = a.x + (b * time + t) * features;
    states[r] =
        is_first ? a.h_0 + b * hidden : a.outputs + (b * time + t + (a.reverse ? 1 : -1)) * hidden;
  }
  const int64_t unit = panel * kLanes;
  const int count = std::min<int64_t>(kLanes, hidden - unit);
  Vec acc[kRows][4];
  if (any) {
    for (int v = 0; v < 4; ++v) {
      for (int r = 0; r < kRows; ++r) {
        const int64_t step = (row + r) * time + t;
        acc[r][v] = a.sums ? Load(a.sums + (step * 4 + v) * hidden + unit, count)
                           : Load(packed + v * kLanes);
      }
    }
    if (!a.sums) Multiply<kRows>(acc, inputs, packed + kColumns, features);
    Multiply<kRows>(acc, states, packed + (1 + features) * kColumns, hidden);
  }
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = row + r, step = b * time + t;
    const bool is_valid = t < a.lengths[b];
    float* c_n = a.c_n + b * hidden + unit;
    Vec h{};
    Vec i{}, f{}, g{}, o{}, c{};
    if (is_valid) {
      i = Sigmoid(acc[r][0]), f = Sigmoid(acc[r][1]), g = Tanh(acc[r][2]), o = Sigmoid(acc[r][3]);
      c = f * Load(c_n, count) + i * g;
      h = o * Tanh(c);
      Store(c_n, c, count);
      Store(a.h_n + b * hidden + unit, h, count);
    }
    Store(a.outputs + step * hidden + unit, h, count);
    if (a.gates) {
      float* gates = a.gates + step * 4 * hidden + unit;
      Stream(gates, i, count);
      Stream(gates + hidden, f, count);
      Stream(gates + 2 * hidden, g, count);
      Stream(gates + 3 * hidden, o, count);
      Stream(a.cells + step * hidden + unit, c, count);
    }
  }
}

// Calls Tile<rows>(arguments) with a constant number of rows.
#define CALL_TILE(Tile, rows, ...)                     \
  switch (rows) {                                      \
    case 1: Tile<1>(__VA_ARGS__); break;               \
    case 2: Tile<2>(__VA_ARGS__); break;               \
    case 3: Tile<3>(__VA_ARGS__); break;               \
    case 4: Tile<std::min(4, kTileRows)>(__VA_ARGS__); break; \
    case 5: Tile<std::min(5, kTileRows)>(__VA_ARGS__); break; \
    default: Tile<kTileRows>(__VA_ARGS__);             \
  }

void RunForward(ForwardArrays a) {
  const auto [batch, time, features, hidden] = a.size;
  Scratch sums(batch < kTileRows && !a.gates ? batch * time * 4 * hidden : 0);
  if (batch < kTileRows) a.sums = a.gates ? a.gates : sums.data();
  const int64_t panels = (hidden + kLanes - 1) / kLanes;
  const int64_t panel_size = (1 + features + hidden) * kColumns;
  std::memcpy(a.h_n, a.h_0, batch * hidden * 4);
  std::memcpy(a.c_n, a.c_0, batch * hidden * 4);
  Parallel(batch, kTileRows, panels, panel_size * 4, [&, batch = batch, time = time](Span mine, auto next, Barrier& barrier) {
    Scratch scratch((mine.end - mine.begin) * panel_size);
    float* packed = scratch.data();
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      float* panel = packed + (p - mine.begin) * panel_size;
      PackForward(a, p, panel);
      for (int64_t row = 0; a.sums && row < batch * time; row += kTileRows) {
        CALL_TILE(InputTile, batch * time - row, a, row, p, panel);
      }
    }
    for (Span rows; next(&rows);) {
      for (int64_t step = 0; step < time; ++step) {
        const int64_t t = a.reverse ? time - 1 - step : step;
        for (int64_t p = mine.begin; p < mine.end; ++p) {
          const float* panel = packed + (p - mine.begin) * panel_size;
          for (int64_t row = rows.begin; row < rows.end; row += kTileRows) {
            CALL_TILE(ForwardTile, rows.end - row, a, row, t, p, panel);
          }
        }
        barrier.Wait();
      }
    }
    EndStreams();
  });
}

// ---- Backward.

struct BackwardArrays {
  Sizes size;
  const float *x, *kernel_hh, *h_0, *c_0, *outputs, *cells, *d_outputs, *d_h_n, *d_c_n;
  const int32_t* lengths;
  bool reverse;
  float* gates;  // become the gradients of the sums that went into them
  float *d_kernel_ih, *d_kernel_hh, *d_bias, *d_c_0;
  const float* zeros;  // [4 * hidden]
};

// A panel: for each column of kernel_hh, kColumns of its rows.
void PackBackward(const BackwardArrays& a, int64_t panel, float* to) {
  const int64_t hidden = a.size.hidden, unit = panel * kColumns;
  const int64_t count = std::min<int64_t>(kColumns, hidden - unit);
  constexpr int64_t kBlock = 16;  // columns at a time, so that whole cache lines are read
  for (int64_t k = 0; k < 4 * hidden; k += kBlock) {
    const int64_t end = std::min(k + kBlock, 4 * hidden);
    for (int64_t j = 0; j < kColumns; ++j) {
      const float* row = a.kernel_hh + (unit + j) * 4 * hidden;
      for (int64_t c = k; c < end; ++c) to[c * kColumns + j] = j < count ? row[c] : 0.f;
    }
  }
}

template <int kRows>
void BackwardTile(const BackwardArrays& a, int64_t row, int64_t t, int64_t panel,
                  const float* packed) {
  const auto [batch, time, features, hidden] = a.size;
  const float* later[kRows];
  bool any = false;
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = row + r, length = a.lengths[b];
    const bool is_last = a.reverse ? t == 0 : t + 1 >= length;
    any |= !is_last && t < length;
    later[r] = is_last ? a.zeros : a.gates + (b * time + t + (a.reverse ? -1 : 1)) * 4 * hidden;
  }
  Vec acc[kRows][4] = {};
  if (any) Multiply<kRows>(acc, later, packed, 4 * hidden);
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = row + r, length = a.lengths[b], step = b * time + t;
    const bool is_last = a.reverse ? t == 0 : t + 1 >= length;
    const bool is_first = a.reverse ? t + 1 >= length : t == 0;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t unit = panel * kColumns + v * kLanes;
      if (unit >= hidden) break;
      const int count = std::min<int64_t>(kLanes, hidden - unit);
      float* gates = a.gates + step * 4 * hidden + unit;
      if (t >= length) {
        for (int gate = 0; gate < 4; ++gate) Store(gates + gate * hidden, Vec{}, count);
        continue;
      }
      float* d_c_0 = a.d_c_0 + b * hidden + unit;
      const float* before =
          is_first ? a.c_0 + b * hidden : a.cells + (step + (a.reverse ? 1 : -1)) * hidden;
      Vec d_h = acc[r][v] + Load(a.d_outputs + step * hidden + unit, count);
      if (is_last) d_h += Load(a.d_h_n + b * hidden + unit, count);
      const Vec i = Load(gates, count), f = Load(gates + hidden, count);
      const Vec g = Load(gates + 2 * hidden, count), o = Load(gates + 3 * hidden, count);
      const Vec shown = Tanh(Load(a.cells + step * hidden + unit, count));
      const Vec d_c = Load(d_c_0, count) + d_h * o * (1.f - shown * shown);
      Store(gates, d_c * g * i * (1.f - i), count);
      Store(gates + hidden, d_c * Load(before + unit, count) * f * (1.f - f), count);
      Store(gates + 2 * hidden, d_c * i * (1.f - g * g), count);
      Store(gates + 3 * hidden, d_h * shown * o * (1.f - o), count);
      Store(d_c_0, d_c * f, count);
    }
  }
}

void RunBackward(const BackwardArrays& a) {
  const auto [batch, time, features, hidden] = a.size;
  const int64_t panels = (hidden + kColumns - 1) / kColumns;
  const int64_t panel_size = 4 * hidden * kColumns;
  std::memcpy(a.d_c_0, a.d_c_n, batch * hidden * 4);
  Parallel(batch, kTileRows, panels, panel_size * 4, [&](Span mine, auto next, Barrier& barrier) {
    Scratch scratch((mine.end - mine.begin) * panel_size);
    float* packed = scratch.data();
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      PackBackward(a, p, packed + (p - mine.begin) * panel_size);
    }
    for (Span rows; next(&rows);) {
      for (int64_t step = 0; step < time; ++step) {
        const int64_t t = a.reverse ? step : time - 1 - step;
        for (int64_t p = mine.begin; p < mine.end; ++p) {
          const float* panel = packed + (p - mine.begin) * panel_size;
          for (int64_t row = rows.begin; row < rows.end; row += kTileRows) {
            CALL_TILE(BackwardTile, rows.end - row, a, row, t, p, panel);
          }
        }
        barrier.Wait();
      }
    }
  });
}

// Rows of the batch and time whose part in the weights' gradient is added at once.
constexpr int64_t kChunk = 128;

// to[k][column] += sum over rows of rows[row][k] * packed[row][column], for some k.
template <int kRows>
void GradientTile(const float* const* rows, int64_t k, const float* packed, int64_t chunk,
                  float* to, int64_t stride, int64_t columns) {
  Vec acc[kRows][4] = {};
  for (int64_t row = 0; row < chunk; ++row, packed += kColumns) {
    const float* a = rows[row] + k;
    Vec d[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) d[v] = Load(packed + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] += a[r] * d[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v * kLanes < columns; ++v) {
      const int count = std::min<int64_t>(kLanes, columns - v * kLanes);
      float* sum = to + (k + r) * stride + v * kLanes;
      Store(sum, Load(sum, count) + acc[r][v], count);
    }
  }
}

// Lays a panel of the gates' gradients side by side, and adds its sum over the rows to the bias's.
void PackGradients(const float* from, int64_t chunk, int64_t gates, int64_t columns, float* packed,
                   float* d_bias) {
  for (int v = 0; v < 4; ++v) {
    const int count = std::clamp<int64_t>(columns - v * kLanes, 0, kLanes);
    Vec sum{};
    for (int64_t i = 0; i < chunk; ++i) {
      const Vec d = Load(from + i * gates + v * kLanes, count);
      Store(packed + i * kColumns + v * kLanes, d);
      sum += d;
    }
    float* total = d_bias + v * kLanes;
    if (count > 0) Store(total, Load(total, count) + sum, count);
  }
}

// The gradients of both kernels and the bias, from all rows of batch and time.
void RunWeightGradients(const BackwardArrays& a) {
  const auto [batch, time, features, hidden] = a.size;
  const int64_t gates = 4 * hidden, panels = (gates + kColumns - 1) / kColumns;
  std::memset(a.d_kernel_ih, 0, features * gates * 4);
  std::memset(a.d_kernel_hh, 0, hidden * gates * 4);
  std::memset(a.d_bias, 0, gates * 4);
  // Whoever has a panel sees all rows, so that no sum depends on how many threads there are.
  Parallel(panels, 1, 1, 0, [&, features = features, hidden = hidden, time = time, batch = batch](
                                Span, auto next, Barrier&) {
    alignas(64) static thread_local float packed[kChunk * kColumns];
    const float *inputs[kChunk], *states[kChunk];
    for (Span mine; next(&mine);) {
      for (int64_t begin = 0; begin < batch * time; begin += kChunk) {
        const int64_t chunk = std::min(kChunk, batch * time - begin);
        for (int64_t i = 0; i < chunk; ++i) {
          const int64_t row = begin + i, b = row / time, t = row % time;
          const bool is_first = a.reverse ? t + 1 >= a.lengths[b] : t == 0;
          inputs[i] = a.x + row * features;
          states[i] =
              is_first ? a.h_0 + b * hidden : a.outputs + (row + (a.reverse ? 1 : -1)) * hidden;
        }
        for (int64_t p = mine.begin; p < mine.end; ++p) {
          const int64_t column = p * kColumns;
          const int64_t columns = std::min<int64_t>(kColumns, gates - column);
          PackGradients(a.gates + begin * gates + column, chunk, gates, columns, packed,
                        a.d_bias + column);
          for (int64_t k = 0; k < features; k += kTileRows) {
            CALL_TILE(GradientTile, features - k, inputs, k, packed, chunk,
                      a.d_kernel_ih + column, gates, columns);
          }
          for (int64_t k = 0; k < hidden; k += kTileRows) {
            CALL_TILE(GradientTile, hidden - k, states, k, packed, chunk, a.d_kernel_hh + column,
                      gates, columns);
          }
        }
      }
    }
  });
}

// ---- What XLA calls.

using Floats = ffi::Buffer<ffi::F32>;
using Lengths = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<Floats>;

Sizes SizesOf(const Floats& x, int64_t hidden) {
  const auto dims = x.dimensions();
  return {dims[0], dims[1], dims[2], hidden};
}

ffi::Error Forward(Floats x, Floats kernel_ih, Floats kernel_hh, Floats bias, Floats h_0,
                   Floats c_0, Lengths lengths, Result outputs, Result h_n,
                   Result c_n, Result gates, Result cells, bool reverse) {
  const bool keep = gates->element_count() > 0;
  PreferLargePages(outputs->typed_data(), outputs->size_bytes());
  if (keep) PreferLargePages(gates->typed_data(), gates->size_bytes());
  if (keep) PreferLargePages(cells->typed_data(), cells->size_bytes());
  RunForward({SizesOf(x, kernel_hh.dimensions()[0]), x.typed_data(), kernel_ih.typed_data(),
              kernel_hh.typed_data(), bias.typed_data(), h_0.typed_data(), c_0.typed_data(),
              lengths.typed_data(), reverse, outputs->typed_data(), h_n->typed_data(),
              c_n->typed_data(), keep ? gates->typed_data() : nullptr,
              keep ? cells->typed_data() : nullptr});
  return ffi::Error::Success();
}

ffi::Error Backward(Floats x, Floats kernel_hh, Floats h_0, Floats c_0,
                    Lengths lengths, Floats outputs, Floats gates, Floats cells,
                    Floats d_outputs, Floats d_h_n, Floats d_c_n, Result d_gates,
                    Result d_kernel_ih, Result d_kernel_hh, Result d_bias, Result d_c_0,
                    bool reverse) {
  const int64_t hidden = kernel_hh.dimensions()[0];
  if (d_gates->typed_data() != gates.typed_data()) {
    std::memcpy(d_gates->typed_data(), gates.typed_data(), gates.size_bytes());
  }
  const std::vector<float> zeros(4 * hidden);
  const BackwardArrays arrays{SizesOf(x, hidden), x.typed_data(), kernel_hh.typed_data(),
                              h_0.typed_data(), c_0.typed_data(), outputs.typed_data(),
                              cells.typed_data(), d_outputs.typed_data(), d_h_n.typed_data(),
                              d_c_n.typed_data(), lengths.typed_data(), reverse,
                              d_gates->typed_data(), d_kernel_ih->typed_data(),
                              d_kernel_hh->typed_data(), d_bias->typed_data(),
                              d_c_0->typed_data(), zeros.data()};
  RunBackward(arrays);
  RunWeightGradients(arrays);
  return ffi::Error::Success();
}

}  // namespace

// x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths -> outputs, h_n, c_n, gates, cells
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lstm_forward, Forward,
    ffi::Ffi::Bind()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
        .Arg<Lengths>()
        .Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<bool>("reverse"));

// x, kernel_hh, h_0, c_0, lengths, outputs, gates, cells, d_outputs, d_h_n, d_c_n
// -> d_gates, d_kernel_ih, d_kernel_hh, d_bias, d_c_0
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lstm_backward, Backward,
    ffi::Ffi::Bind()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
        .Arg<Lengths>()
        .Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>().Arg<Floats>()
        .Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>().Ret<Floats>()
        .Attr<bool>("reverse"));
