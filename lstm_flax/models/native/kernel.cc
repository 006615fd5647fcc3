// One LSTM layer over whole sequences, forward and backward, on a CPU.
//
// XLA would run each time step as several small products and loops with memory between them. Here
// a step's two products and everything after them happen in registers, tile by tile, and each
// core keeps its share of the weights in its own cache from the first step to the last.
//
// Arrays are dense and in C order: x [batch, time, features], outputs and cells [batch, time,
// hidden], gates [batch, time, 4 * hidden] with i, f, g, o side by side, as everywhere. Inputs,
// outputs and their gradients are of the type N::Number that is multiplied; weights come and go in
// float32, and sums, gates and cell states never are anything else.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "shapes.h"
#include "threads.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace lstm {

struct Sizes {
  int64_t batch, time, features, hidden;
};

// How many of a layer's units, from `unit` on, a vector has.
inline int CountLanes(int64_t hidden, int64_t unit) {
  return std::min<int64_t>(kLanes, hidden - unit);
}

template <typename Number>
const float* AsWords(const Number* numbers) {
  return reinterpret_cast<const float*>(numbers);
}

// Calls Tile<N, rows>(arguments) with a constant number of rows. Where N's products always are of
// whole tiles, the function must leave out rows that there are not: see CountRows.
#define CALL_TILE(Tile, rows, ...)                               \
  if constexpr (N::kIsTiled) {                                   \
    Tile<N, N::kTileRows>(__VA_ARGS__);                          \
  } else {                                                       \
    switch (rows) {                                              \
      case 1: Tile<N, 1>(__VA_ARGS__); break;                    \
      case 2: Tile<N, 2>(__VA_ARGS__); break;                    \
      case 3: Tile<N, 3>(__VA_ARGS__); break;                    \
      case 4: Tile<N, 4>(__VA_ARGS__); break;                    \
      case 5: Tile<N, 5>(__VA_ARGS__); break;                    \
      default: Tile<N, N::kTileRows>(__VA_ARGS__);               \
    }                                                            \
  }

// How many rows a tile of kRows has where so many are left: a constant, but for whole tiles.
template <typename N, int kRows>
constexpr int CountRows(int64_t left) {
  return N::kIsTiled ? static_cast<int>(std::min<int64_t>(kRows, left)) : kRows;
}

// Words of a panel for so many that are multiplied: as many as N's products take at once.
template <typename N>
int64_t WholeWords(int64_t words) {
  return (words + N::kWordsAtOnce - 1) / N::kWordsAtOnce * N::kWordsAtOnce;
}

// Fills up a panel's words, so that what is multiplied by those that there are not adds nothing.
template <typename N>
void FillWords(float* panel, int64_t words) {
  std::fill(panel + words * kColumns, panel + WholeWords<N>(words) * kColumns, 0.f);
}

// The state that a row has before a step, forward as in the gradients.
template <typename Arrays>
const auto* StateBefore(const Arrays& a, int64_t b, int64_t t) {
  const bool is_first = a.reverse ? t + 1 >= a.lengths[b] : t == 0;
  if (is_first) return a.h_0 + b * a.size.hidden;
  return a.outputs + (b * a.size.time + t + (a.reverse ? 1 : -1)) * a.size.hidden;
}

// Has panels of weights packed and then, at each step, a tile computed for all panels and all rows
// of the batch, by as many threads as pay. Threads that have rows of their own need not meet; but
// each reads all panels at each step. Where its cache does not hold them, and its rows are too few
// to be worth their way from memory, or where there are fewer tiles of rows than threads, groups of
// threads share the panels and have the same rows.
//
// pack(panel, to) writes panel_size floats; tile(step, panel, packed, rows) computes.
template <typename N, typename Pack, typename Tile>
void RunSteps(const Helpers& helpers, int64_t batch, int64_t time, int64_t panels,
              int64_t panel_size, const Pack& pack, const Tile& tile) {
  constexpr int64_t kTileRows = N::kTileRows, kWorthReading = 48;
  constexpr int64_t kCacheFloats = 1 << 17;
  constexpr double kWorthMeeting = 1 << 16;  // multiplications of a thread at a step
  constexpr int64_t kBlock = 96;  // rows that stay in the cache from panel to panel
  if (batch == 0 || time == 0 || panels == 0) return;
  const double multiplications = 1. * batch * time * panels * panel_size;
  int threads = CountThreads(helpers, multiplications);
  const auto count_sharing = [&](int groups) {
    const double worth = multiplications / time / groups / kWorthMeeting;
    return static_cast<int>(std::clamp(worth, 1., 1. * std::min<int64_t>(threads / groups, panels)));
  };
  int groups = std::min<int64_t>(threads, (batch + kTileRows - 1) / kTileRows);
  int sharing = count_sharing(groups);
  while (groups > 1 && sharing < panels && batch / groups < kWorthReading &&
         panels * panel_size / sharing > kCacheFloats) {
    groups = (groups + 1) / 2;
    sharing = count_sharing(groups);
  }
  if (sharing > 1) threads = groups * sharing;
  const int64_t parts = CountParts(threads, panels), shared_parts = CountParts(sharing, panels);
  Scratch packed(panels * panel_size);
  auto compute = [&](int64_t step, Span mine, Span rows) {
    for (int64_t block = rows.begin; block < rows.end; block += kBlock) {
      const Span some = {block, std::min(block + kBlock, rows.end)};
      for (int64_t p = mine.begin; p < mine.end; ++p) {
        tile(step, p, packed.data() + p * panel_size, some);
      }
    }
  };

  Steps packing(1, parts, threads);
  Shares shares(batch, kTileRows, threads);
  std::vector<std::unique_ptr<Steps>> steps;
  for (int g = 0; sharing > 1 && g < groups; ++g) {
    steps.push_back(std::make_unique<Steps>(time, shared_parts, sharing));
  }
  Parallel(helpers, threads, [&](int thread) {
    const typename N::Processor ready;
    packing.Run(thread, [&](int64_t, int64_t part) {
      const Span mine = Part(panels, 1, parts, part);
      for (int64_t p = mine.begin; p < mine.end; ++p) pack(p, packed.data() + p * panel_size);
    });
    for (int g = 0; g < static_cast<int>(steps.size()); ++g) {
      const int group = (thread + g) % groups;
      const Span rows = Part(batch, kTileRows, groups, group);
      steps[group]->Run(thread / groups, [&](int64_t step, int64_t part) {
        compute(step, Part(panels, 1, shared_parts, part), rows);
      });
    }
    for (Span rows; steps.empty() && shares.Next(&rows);) {
      for (int64_t step = 0; step < time; ++step) compute(step, {0, panels}, rows);
    }
    EndStreams();
  });
}

// ---- Forward.

template <typename N>
struct ForwardArrays {
  typedef typename N::Number Number;
  Sizes size;
  const Number* x;
  const float *kernel_ih, *kernel_hh, *bias;
  const Number* h_0;
  const float* c_0;
  const int32_t* lengths;
  bool reverse;
  Number *outputs, *h_n;
  float *c_n, *gates, *cells;  // the last two may be null
  float* sums = nullptr;  // [batch, time, 4 * hidden] of bias and inputs, where added up ahead
};

// A panel: the bias, then for each word of features and of hidden units 4 gates of kLanes units.
template <typename N>
int64_t ForwardPanelSize(const Sizes& size) {
  return (1 + WholeWords<N>(size.features / N::kPerWord) +
          WholeWords<N>(size.hidden / N::kPerWord)) * kColumns;
}

template <typename N>
void PackForward(const ForwardArrays<N>& a, int64_t panel, float* to) {
  const int64_t hidden = a.size.hidden, unit = panel * kLanes;
  const int count = CountLanes(hidden, unit);
  for (int gate = 0; gate < 4; ++gate, to += kLanes) {
    Store(to, Load(a.bias + gate * hidden + unit, count));
  }
  auto pack = [&](const float* kernel, int64_t rows) {
    for (int64_t k = 0; k < rows; k += N::kPerWord) {
      for (int gate = 0; gate < 4; ++gate, to += kLanes) {
        const float* first = kernel + (4 * k + gate) * hidden + unit;
        const float* second = first + (N::kPerWord - 1) * 4 * hidden;
        Store(to, N::Join(Load(first, count), Load(second, count)));
      }
    }
    const int64_t words = rows / N::kPerWord;
    float* const begin = to - words * kColumns;
    FillWords<N>(begin, words);
    to = begin + WholeWords<N>(words) * kColumns;
  };
  pack(a.kernel_ih, a.size.features);
  pack(a.kernel_hh, hidden);
}

// For a batch of less than a tile: the part of the inputs in the sums, for so many rows of batch and
// time at once, so that their weights are not read again at each step.
template <typename N, int kRows>
void InputTile(const ForwardArrays<N>& a, int64_t row, int64_t panel, const float* packed) {
  const auto [batch, time, features, hidden] = a.size;
  const int rows = CountRows<N, kRows>(batch * time - row);
  const float* inputs[kRows];
  for (int r = 0; r < rows; ++r) inputs[r] = AsWords(a.x + (row + r) * features);
  Vec acc[kRows][4];
  for (int v = 0; v < 4; ++v) {
    for (int r = 0; r < rows; ++r) acc[r][v] = Load(packed + v * kLanes);
  }
  Multiply<N, kRows>(acc, inputs, rows, packed + kColumns, features / N::kPerWord);
  const int64_t unit = panel * kLanes;
  const int count = CountLanes(hidden, unit);
  for (int r = 0; r < rows; ++r) {
    float* sums = a.sums + (row + r) * 4 * hidden + unit;
    for (int gate = 0; gate < 4; ++gate) Store(sums + gate * hidden, acc[r][gate], count);
  }
}

// From the sums that go into the gates to the outputs, for a vector of units of one row.
template <typename N>
void FinishStep(const ForwardArrays<N>& a, int64_t b, int64_t t, int64_t unit, const Vec* sums) {
  const auto [batch, time, features, hidden] = a.size;
  const int count = CountLanes(hidden, unit);
  const int64_t step = b * time + t;
  float* c_n = a.c_n + b * hidden + unit;
  Vec h{}, i{}, f{}, g{}, o{}, c{};
  if (t < a.lengths[b]) {
    i = Sigmoid(sums[0]), f = Sigmoid(sums[1]), g = Tanh(sums[2]), o = Sigmoid(sums[3]);
    c = f * Load(c_n, count) + i * g;
    h = o * Tanh(c);
    Store(c_n, c, count);
    N::Write(a.h_n + b * hidden + unit, h, count);
  }
  N::Write(a.outputs + step * hidden + unit, h, count);
  if (a.gates) {
    float* gates = a.gates + step * 4 * hidden + unit;
    Stream(gates, i, count);
    Stream(gates + hidden, f, count);
    Stream(gates + 2 * hidden, g, count);
    Stream(gates + 3 * hidden, o, count);
    Stream(a.cells + step * hidden + unit, c, count);
  }
}

template <typename N, int kRows>
void ForwardTile(const ForwardArrays<N>& a, int64_t row, int64_t t, int64_t panel,
                 const float* packed) {
  const auto [batch, time, features, hidden] = a.size;
  const int rows = CountRows<N, kRows>(batch - row);
  const float *inputs[kRows], *states[kRows];
  bool any = false;
  for (int r = 0; r < rows; ++r) {
    any |= t < a.lengths[row + r];
    inputs[r] = AsWords(a.x + ((row + r) * time + t) * features);
    states[r] = AsWords(StateBefore(a, row + r, t));
  }
  const int64_t unit = panel * kLanes;
  const int count = CountLanes(hidden, unit);
  Vec acc[kRows][4];
  if (any) {
    for (int v = 0; v < 4; ++v) {
      for (int r = 0; r < rows; ++r) {
        const int64_t step = (row + r) * time + t;
        acc[r][v] = a.sums ? Load(a.sums + (step * 4 + v) * hidden + unit, count)
                           : Load(packed + v * kLanes);
      }
    }
    const int64_t words = features / N::kPerWord;
    if (!a.sums) Multiply<N, kRows>(acc, inputs, rows, packed + kColumns, words);
    Multiply<N, kRows>(acc, states, rows, packed + (1 + WholeWords<N>(words)) * kColumns,
                       hidden / N::kPerWord);
  }
  for (int r = 0; r < rows; ++r) FinishStep(a, row + r, t, unit, acc[r]);
}

template <typename N>
void RunForward(const Helpers& helpers, ForwardArrays<N> a) {
  const int64_t batch = a.size.batch, time = a.size.time, hidden = a.size.hidden;
  std::copy_n(a.h_0, batch * hidden, a.h_n);
  std::copy_n(a.c_0, batch * hidden, a.c_n);
  const bool ahead = batch < N::kTileRows;
  Scratch sums(ahead && !a.gates ? batch * time * 4 * hidden : 0);
  if (ahead) a.sums = a.gates ? a.gates : sums.data();
  auto pack = [&](int64_t panel, float* packed) {
    PackForward(a, panel, packed);
    for (int64_t row = 0; ahead && row < batch * time; row += N::kTileRows) {
      CALL_TILE(InputTile, batch * time - row, a, row, panel, packed);
    }
  };
  auto tile = [&](int64_t step, int64_t panel, const float* packed, Span rows) {
    const int64_t t = a.reverse ? time - 1 - step : step;
    for (int64_t row = rows.begin; row < rows.end; row += N::kTileRows) {
      CALL_TILE(ForwardTile, rows.end - row, a, row, t, panel, packed);
    }
  };
  RunSteps<N>(helpers, batch, time, (hidden + kLanes - 1) / kLanes, ForwardPanelSize<N>(a.size),
              pack, tile);
}

// ---- Backward.

template <typename N>
struct GateGradientArrays {
  typedef typename N::Number Number;
  Sizes size;
  const float *kernel_hh, *c_0;
  const int32_t* lengths;
  const float *gates, *cells;
  const Number *d_outputs, *d_h_n;
  const float* d_c_n;
  bool reverse;
  Number* d_gates;  // of the sums that went into the gates; may be where the gates are
  float* d_c_0;
  const Number* zeros;  // as many as there are gates
};

// A panel: for each word of a row of a kernel [rows, columns], that word of kColumns rows.
template <typename N>
void PackTransposed(const float* kernel, int64_t rows, int64_t columns, int64_t panel, float* to) {
  const int64_t words = columns / N::kPerWord;
  for (int64_t k = 0; k < words; k += kLanes) {
    const int64_t end = std::min<int64_t>(k + kLanes, words);
    for (int64_t j = 0; j < kColumns; ++j) {
      const int64_t row = panel * kColumns + j;
      alignas(64) typename N::Number numbers[N::kPerWord * kLanes] = {};
      for (int v = 0; v < N::kPerWord && row < rows; ++v) {
        const int64_t column = k * N::kPerWord + v * kLanes;
        const int count = std::clamp<int64_t>(columns - column, 0, kLanes);
        N::Write(numbers + v * kLanes, Load(kernel + row * columns + column, count), count);
      }
      for (int64_t w = k; w < end; ++w) {
        std::memcpy(to + w * kColumns + j, numbers + (w - k) * N::kPerWord, 4);
      }
    }
  }
  FillWords<N>(to, words);
}

template <typename N, int kRows>
void GateGradientTile(const GateGradientArrays<N>& a, int64_t row, int64_t t, int64_t panel,
                  const float* packed) {
  const auto [batch, time, features, hidden] = a.size;
  const int rows = CountRows<N, kRows>(batch - row);
  const float* later[kRows];
  bool any = false;
  for (int r = 0; r < rows; ++r) {
    const int64_t b = row + r, length = a.lengths[b];
    const bool is_last = a.reverse ? t == 0 : t + 1 >= length;
    any |= !is_last && t < length;
    later[r] = AsWords(is_last ? a.zeros
                               : a.d_gates + (b * time + t + (a.reverse ? -1 : 1)) * 4 * hidden);
  }
  Vec acc[kRows][4] = {};
  if (any) Multiply<N, kRows>(acc, later, rows, packed, 4 * hidden / N::kPerWord);
  for (int r = 0; r < rows; ++r) {
    const int64_t b = row + r, length = a.lengths[b], step = b * time + t;
    const bool is_last = a.reverse ? t == 0 : t + 1 >= length;
    const bool is_first = a.reverse ? t + 1 >= length : t == 0;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t unit = panel * kColumns + v * kLanes;
      if (unit >= hidden) break;
      const int count = CountLanes(hidden, unit);
      const float* gates = a.gates + step * 4 * hidden + unit;
      typename N::Number* d_gates = a.d_gates + step * 4 * hidden + unit;
      if (t >= length) {
        for (int gate = 0; gate < 4; ++gate) N::Write(d_gates + gate * hidden, Vec{}, count);
        continue;
      }
      float* d_c_0 = a.d_c_0 + b * hidden + unit;
      const float* before =
          is_first ? a.c_0 + b * hidden : a.cells + (step + (a.reverse ? 1 : -1)) * hidden;
      Vec d_h = acc[r][v] + N::Read(a.d_outputs + step * hidden + unit, count);
      if (is_last) d_h += N::Read(a.d_h_n + b * hidden + unit, count);
      const Vec i = Load(gates, count), f = Load(gates + hidden, count);
      const Vec g = Load(gates + 2 * hidden, count), o = Load(gates + 3 * hidden, count);
      const Vec shown = Tanh(Load(a.cells + step * hidden + unit, count));
      const Vec d_c = Load(d_c_0, count) + d_h * o * (1.f - shown * shown);
      N::Write(d_gates, d_c * g * i * (1.f - i), count);
      N::Write(d_gates + hidden, d_c * Load(before + unit, count) * f * (1.f - f), count);
      N::Write(d_gates + 2 * hidden, d_c * i * (1.f - g * g), count);
      N::Write(d_gates + 3 * hidden, d_h * shown * o * (1.f - o), count);
      Store(d_c_0, d_c * f, count);
    }
  }
}

template <typename N>
void RunGateGradients(const Helpers& helpers, const GateGradientArrays<N>& a) {
  const int64_t batch = a.size.batch, time = a.size.time, hidden = a.size.hidden;
  std::copy_n(a.d_c_n, batch * hidden, a.d_c_0);
  auto pack = [&](int64_t panel, float* packed) {
    PackTransposed<N>(a.kernel_hh, hidden, 4 * hidden, panel, packed);
  };
  auto tile = [&](int64_t step, int64_t panel, const float* packed, Span rows) {
    const int64_t t = a.reverse ? step : time - 1 - step;
    for (int64_t row = rows.begin; row < rows.end; row += N::kTileRows) {
      CALL_TILE(GateGradientTile, rows.end - row, a, row, t, panel, packed);
    }
  };
  RunSteps<N>(helpers, batch, time, (hidden + kColumns - 1) / kColumns,
              WholeWords<N>(4 * hidden / N::kPerWord) * kColumns, pack, tile);
}

template <typename N>
struct InputGradientArrays {
  typedef typename N::Number Number;
  int64_t rows, features, gates;
  const Number* d_gates;   // [rows, gates]
  const float* kernel_ih;  // [features, gates]
  Number* d_x;             // [rows, features]
};

template <typename N, int kRows>
void InputGradientTile(const InputGradientArrays<N>& a, int64_t row, int64_t panel,
                       const float* packed) {
  const int rows = CountRows<N, kRows>(a.rows - row);
  const float* d_gates[kRows];
  for (int r = 0; r < rows; ++r) d_gates[r] = AsWords(a.d_gates + (row + r) * a.gates);
  Vec acc[kRows][4] = {};
  Multiply<N, kRows>(acc, d_gates, rows, packed, a.gates / N::kPerWord);
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < 4; ++v) {
      const int64_t feature = panel * kColumns + v * kLanes;
      if (feature >= a.features) break;
      N::Write(a.d_x + (row + r) * a.features + feature, acc[r][v],
               CountLanes(a.features, feature));
    }
  }
}

template <typename N>
void RunInputGradient(const Helpers& helpers, const InputGradientArrays<N>& a) {
  auto pack = [&](int64_t panel, float* packed) {
    PackTransposed<N>(a.kernel_ih, a.features, a.gates, panel, packed);
  };
  auto tile = [&](int64_t, int64_t panel, const float* packed, Span rows) {
    for (int64_t row = rows.begin; row < rows.end; row += N::kTileRows) {
      CALL_TILE(InputGradientTile, rows.end - row, a, row, panel, packed);
    }
  };
  RunSteps<N>(helpers, a.rows, 1, (a.features + kColumns - 1) / kColumns,
              WholeWords<N>(a.gates / N::kPerWord) * kColumns, pack, tile);
}

// How the inputs and states lie that are multiplied by the gates' gradients: in tiles of kTileRows
// columns, in each of which are the words of a chunk of rows of batch and time, added up at once. A
// word has the numbers of as many rows.
template <typename N>
struct InTiles {
  static constexpr int64_t kChunk = N::kIsTiled ? 512 : 128;
  static constexpr int64_t kWords = kChunk / N::kPerWord, kTileSize = kWords * N::kTileRows;
  // From a word to the next one, and from a column to the next one.
  static constexpr int64_t kWordStride = N::kIsTiled ? 1 : N::kTileRows;
  static constexpr int64_t kColumnStride = N::kIsTiled ? kWords : 1;
};

// to[r][column] += sum over so many words of in_tile[word][r] * packed[word][column], for so many
// rows and columns.
template <typename N, int kRows>
void GradientTile(const float* in_tile, const float* packed, int64_t number, float* to,
                  int64_t stride, int64_t left, int64_t columns) {
  const int rows = CountRows<N, kRows>(left);
  Vec acc[kRows][4] = {};
  if constexpr (N::kIsTiled) {
    const float* of_columns[kRows];
    for (int r = 0; r < kRows; ++r) of_columns[r] = in_tile + r * InTiles<N>::kColumnStride;
    Multiply<N, kRows>(acc, of_columns, kRows, packed, number);
  } else {
    const auto word = [&](int r, int64_t i) { return in_tile[i * N::kTileRows + r]; };
    MultiplyWords<N, kRows>(acc, word, packed, number);
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v * kLanes < columns; ++v) {
      const int count = std::min<int64_t>(kLanes, columns - v * kLanes);
      float* sum = to + r * stride + v * kLanes;
      Store(sum, Load(sum, count) + acc[r][v], count);
    }
  }
}

// Lays a panel of the gates' gradients side by side, and adds its sum over the rows to the bias's.
template <typename N>
void PackGradients(const typename N::Number* from, int64_t rows, int64_t gates, int64_t columns,
                   float* packed, float* d_bias) {
  for (int v = 0; v < 4; ++v) {
    const int count = std::clamp<int64_t>(columns - v * kLanes, 0, kLanes);
    Vec sum{};
    for (int64_t i = 0; i < rows; i += N::kPerWord) {
      Vec d[2] = {};
      for (int64_t n = 0; n < N::kPerWord && i + n < rows; ++n) {
        d[n] = N::Read(from + (i + n) * gates + v * kLanes, count);
        sum += d[n];
      }
      Store(packed + i / N::kPerWord * kColumns + v * kLanes, N::Join(d[0], d[1]));
    }
    float* total = d_bias + v * kLanes;
    if (count > 0) Store(total, Load(total, count) + sum, count);
  }
  FillWords<N>(packed, (rows + N::kPerWord - 1) / N::kPerWord);
}

template <typename N>
struct WeightGradientArrays {
  typedef typename N::Number Number;
  Sizes size;
  const Number *x, *h_0, *outputs;
  const int32_t* lengths;
  const Number* d_gates;
  bool reverse;
  float *d_kernel_ih, *d_kernel_hh, *d_bias;
  const Number* zeros;  // as many as there are features or units
};

// Lays so many numbers of one row, or of two that share words, into tiles, so that a product finds
// them side by side. `to` is this word's place in the first tile, `joined` has room for a row.
template <typename N>
void PackRow(const typename N::Number* first, const typename N::Number* second, int64_t count,
             float* joined, float* to) {
  const float* words = N::JoinRows(first, second, count, joined);
  for (int64_t k = 0; k < count; k += N::kTileRows, to += InTiles<N>::kTileSize) {
    for (int64_t r = 0; r < std::min<int64_t>(N::kTileRows, count - k); ++r) {
      to[r * InTiles<N>::kColumnStride] = words[k + r];
    }
  }
}

// The gradients of both kernels and the bias, from all rows of batch and time, chunk by chunk:
// first the inputs and states of a chunk are laid in tiles, then each panel of the gates' gradients
// is multiplied by all of them. A panel's sums meet the chunks in order, whoever adds them up.
template <typename N>
void RunWeightGradients(const Helpers& helpers, const WeightGradientArrays<N>& a) {
  const int64_t time = a.size.time, features = a.size.features, hidden = a.size.hidden;
  const int64_t total = a.size.batch * time;
  const int64_t gates = 4 * hidden, panels = (gates + kColumns - 1) / kColumns;
  constexpr int64_t kTileRows = N::kTileRows, kChunk = InTiles<N>::kChunk;
  constexpr int64_t kTileSize = InTiles<N>::kTileSize, kWordStride = InTiles<N>::kWordStride;
  const int64_t input_tiles = (features + kTileRows - 1) / kTileRows;
  const int64_t tiles = input_tiles + (hidden + kTileRows - 1) / kTileRows;
  std::fill_n(a.d_kernel_ih, features * gates, 0.f);
  std::fill_n(a.d_kernel_hh, hidden * gates, 0.f);
  std::fill_n(a.d_bias, gates, 0.f);
  if (total == 0 || hidden == 0) return;
  auto input = [&](int64_t row) { return a.x + row * features; };
  auto state_before = [&](int64_t row) { return StateBefore(a, row / time, row % time); };
  const int threads =
      CountThreads(helpers, 1. * total * (features + hidden) * gates / N::kPerWord);
  const int64_t parts = CountParts(threads, panels);
  Scratch in_tiles(tiles * kTileSize);
  Steps steps(2 * ((total + kChunk - 1) / kChunk), parts, threads);
  Parallel(helpers, threads, [&](int thread) {
    const typename N::Processor ready;
    Scratch packed(InTiles<N>::kWords * kColumns), joined(std::max(features, hidden));
    steps.Run(thread, [&](int64_t step, int64_t part) {
      const int64_t begin = step / 2 * kChunk, rows = std::min(kChunk, total - begin);
      const int64_t words = (rows + N::kPerWord - 1) / N::kPerWord;
      if (step % 2 == 0) {
        const Span xs = Part(features, kTileRows, parts, part);
        const Span hs = Part(hidden, kTileRows, parts, part);
        float* to_x = in_tiles.data() + xs.begin / kTileRows * kTileSize;
        float* to_h = in_tiles.data() + (input_tiles + hs.begin / kTileRows) * kTileSize;
        for (int64_t i = 0; i < words; ++i, to_x += kWordStride, to_h += kWordStride) {
          const int64_t row = begin + i * N::kPerWord, other = row + N::kPerWord - 1;
          const bool is_whole = other < begin + rows;
          PackRow<N>(input(row) + xs.begin, (is_whole ? input(other) : a.zeros) + xs.begin,
                     xs.end - xs.begin, joined.data(), to_x);
          PackRow<N>(state_before(row) + hs.begin,
                     (is_whole ? state_before(other) : a.zeros) + hs.begin, hs.end - hs.begin,
                     joined.data(), to_h);
        }
        return;
      }
      const Span mine = Part(panels, 1, parts, part);
      for (int64_t p = mine.begin; p < mine.end; ++p) {
        const int64_t column = p * kColumns;
        const int64_t columns = std::min<int64_t>(kColumns, gates - column);
        PackGradients<N>(a.d_gates + begin * gates + column, rows, gates, columns, packed.data(),
                         a.d_bias + column);
        const float* tile = in_tiles.data();
        for (int64_t k = 0; k < features; k += kTileRows, tile += kTileSize) {
          CALL_TILE(GradientTile, features - k, tile, packed.data(), words,
                    a.d_kernel_ih + k * gates + column, gates, features - k, columns);
        }
        for (int64_t k = 0; k < hidden; k += kTileRows, tile += kTileSize) {
          CALL_TILE(GradientTile, hidden - k, tile, packed.data(), words,
                    a.d_kernel_hh + k * gates + column, gates, hidden - k, columns);
        }
      }
    });
  });
}

// ---- What XLA calls, with buffers of the right types, but of any shape.

using Floats = ffi::Buffer<ffi::F32>;
using FloatsResult = ffi::Result<Floats>;
using Lengths = ffi::Buffer<ffi::S32>;
template <typename N>
using Numbers = ffi::Buffer<N::kPerWord == 1 ? ffi::F32 : ffi::BF16>;
template <typename N>
using NumbersResult = ffi::Result<Numbers<N>>;

// No exception may reach XLA. The text is short enough to need no memory of its own.
inline ffi::Error OutOfMemory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
}

// XLA's threads: as many as it was told to have, and with a little work for each.
inline Helpers HelpersOf(ffi::ThreadPool& pool) {
  return {static_cast<int>(pool.num_threads()) - 1,
          [&](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

template <typename N>
ffi::Error Forward(ffi::ThreadPool pool, Numbers<N> x, Floats kernel_ih, Floats kernel_hh,
                   Floats bias, Numbers<N> h_0, Floats c_0, Lengths lengths,
                   NumbersResult<N> outputs, NumbersResult<N> h_n, FloatsResult c_n,
                   FloatsResult gates, FloatsResult cells, bool reverse) try {
  const Sizes size = {Dim(x, 0), Dim(x, 1), Dim(x, 2), Dim(kernel_hh, 0)};
  const auto [batch, time, features, hidden] = size;
  const bool keep = !IsEmpty(*gates) || !IsEmpty(*cells);
  Checks checks;
  checks.Shape("x [batch, time, features]", x, {batch, time, features});
  checks.Shape("kernel_hh [hidden, 4 * hidden]", kernel_hh, {hidden, 4 * hidden});
  checks.Shape("kernel_ih [features, 4 * hidden]", kernel_ih, {features, 4 * hidden});
  checks.Shape("bias [4 * hidden]", bias, {4 * hidden});
  checks.Shape("h_0 [batch, hidden]", h_0, {batch, hidden});
  checks.Shape("c_0 [batch, hidden]", c_0, {batch, hidden});
  checks.Shape("lengths [batch]", lengths, {batch});
  checks.Shape("outputs [batch, time, hidden]", *outputs, {batch, time, hidden});
  checks.Shape("h_n [batch, hidden]", *h_n, {batch, hidden});
  checks.Shape("c_n [batch, hidden]", *c_n, {batch, hidden});
  if (keep) checks.Shape("gates [batch, time, 4 * hidden]", *gates, {batch, time, 4 * hidden});
  if (keep) checks.Shape("cells [batch, time, hidden]", *cells, {batch, time, hidden});
  checks.Words("features", features, N::kPerWord);
  checks.Words("hidden", hidden, N::kPerWord);
  checks.Range("lengths", lengths, time);
  if (checks.failed()) return checks.error();

  PreferLargePages(outputs->typed_data(), outputs->size_bytes());
  if (keep) PreferLargePages(gates->typed_data(), gates->size_bytes());
  if (keep) PreferLargePages(cells->typed_data(), cells->size_bytes());
  RunForward<N>(
      HelpersOf(pool),
      {size, x.typed_data(), kernel_ih.typed_data(), kernel_hh.typed_data(), bias.typed_data(),
       h_0.typed_data(), c_0.typed_data(), lengths.typed_data(), reverse, outputs->typed_data(),
       h_n->typed_data(), c_n->typed_data(),
       keep ? gates->typed_data() : nullptr, keep ? cells->typed_data() : nullptr});
  return ffi::Error::Success();
} catch (const std::exception&) {
  return OutOfMemory();
}

template <typename N>
ffi::Error GateGradients(ffi::ThreadPool pool, Floats kernel_hh, Floats c_0, Lengths lengths,
                         Floats gates, Floats cells, Numbers<N> d_outputs, Numbers<N> d_h_n,
                         Floats d_c_n, NumbersResult<N> d_gates, FloatsResult d_c_0,
                         bool reverse) try {
  const int64_t batch = Dim(cells, 0), time = Dim(cells, 1), hidden = Dim(kernel_hh, 0);
  Checks checks;
  checks.Shape("kernel_hh [hidden, 4 * hidden]", kernel_hh, {hidden, 4 * hidden});
  checks.Shape("c_0 [batch, hidden]", c_0, {batch, hidden});
  checks.Shape("lengths [batch]", lengths, {batch});
  checks.Shape("gates [batch, time, 4 * hidden]", gates, {batch, time, 4 * hidden});
  checks.Shape("cells [batch, time, hidden]", cells, {batch, time, hidden});
  checks.Shape("d_outputs [batch, time, hidden]", d_outputs, {batch, time, hidden});
  checks.Shape("d_h_n [batch, hidden]", d_h_n, {batch, hidden});
  checks.Shape("d_c_n [batch, hidden]", d_c_n, {batch, hidden});
  checks.Shape("d_gates [batch, time, 4 * hidden]", *d_gates, {batch, time, 4 * hidden});
  checks.Shape("d_c_0 [batch, hidden]", *d_c_0, {batch, hidden});
  checks.Words("hidden", hidden, N::kPerWord);
  checks.Range("lengths", lengths, time);
  if (checks.failed()) return checks.error();

  const std::vector<typename N::Number> zeros(IsEmpty(cells) ? 0 : 4 * hidden);
  RunGateGradients<N>(
      HelpersOf(pool),
      {{batch, time, 0, hidden}, kernel_hh.typed_data(), c_0.typed_data(), lengths.typed_data(),
       gates.typed_data(), cells.typed_data(), d_outputs.typed_data(), d_h_n.typed_data(),
       d_c_n.typed_data(), reverse, d_gates->typed_data(), d_c_0->typed_data(), zeros.data()});
  return ffi::Error::Success();
} catch (const std::exception&) {
  return OutOfMemory();
}

template <typename N>
ffi::Error WeightGradients(ffi::ThreadPool pool, Numbers<N> x, Numbers<N> h_0, Numbers<N> outputs,
                           Lengths lengths, Numbers<N> d_gates, FloatsResult d_kernel_ih,
                           FloatsResult d_kernel_hh, FloatsResult d_bias, bool reverse) try {
  const int64_t batch = Dim(x, 0), time = Dim(x, 1), features = Dim(x, 2), hidden = Dim(h_0, 1);
  Checks checks;
  checks.Shape("x [batch, time, features]", x, {batch, time, features});
  checks.Shape("h_0 [batch, hidden]", h_0, {batch, hidden});
  checks.Shape("outputs [batch, time, hidden]", outputs, {batch, time, hidden});
  checks.Shape("lengths [batch]", lengths, {batch});
  checks.Shape("d_gates [batch, time, 4 * hidden]", d_gates, {batch, time, 4 * hidden});
  checks.Shape("d_kernel_ih [features, 4 * hidden]", *d_kernel_ih, {features, 4 * hidden});
  checks.Shape("d_kernel_hh [hidden, 4 * hidden]", *d_kernel_hh, {hidden, 4 * hidden});
  checks.Shape("d_bias [4 * hidden]", *d_bias, {4 * hidden});
  checks.Words("features", features, N::kPerWord);
  checks.Words("hidden", hidden, N::kPerWord);
  checks.Range("lengths", lengths, time);
  if (checks.failed()) return checks.error();

  const std::vector<typename N::Number> zeros(IsEmpty(outputs) ? 0 : std::max(hidden, features));
  RunWeightGradients<N>(
      HelpersOf(pool),
      {{batch, time, features, hidden}, x.typed_data(), h_0.typed_data(), outputs.typed_data(),
       lengths.typed_data(), d_gates.typed_data(), reverse, d_kernel_ih->typed_data(),
       d_kernel_hh->typed_data(), d_bias->typed_data(), zeros.data()});
  return ffi::Error::Success();
} catch (const std::exception&) {
  return OutOfMemory();
}

template <typename N>
ffi::Error InputGradient(ffi::ThreadPool pool, Numbers<N> d_gates, Floats kernel_ih,
                         NumbersResult<N> d_x) try {
  const int64_t batch = Dim(d_gates, 0), time = Dim(d_gates, 1), gates = Dim(d_gates, 2);
  const int64_t features = Dim(kernel_ih, 0);
  Checks checks;
  checks.Shape("d_gates [batch, time, gates]", d_gates, {batch, time, gates});
  checks.Shape("kernel_ih [features, gates]", kernel_ih, {features, gates});
  checks.Shape("d_x [batch, time, features]", *d_x, {batch, time, features});
  checks.Words("gates", gates, N::kPerWord);
  if (checks.failed()) return checks.error();

  RunInputGradient<N>(
      HelpersOf(pool),
      {batch * time, features, gates, d_gates.typed_data(), kernel_ih.typed_data(),
       d_x->typed_data()});
  return ffi::Error::Success();
} catch (const std::exception&) {
  return OutOfMemory();
}

}  // namespace lstm

// x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths -> outputs, h_n, c_n, gates, cells
#define DEFINE_FORWARD(name, N)                                                          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                         \
      name, lstm::Forward<N>,                                                            \
      ffi::Ffi::Bind()                                                                   \
          .Ctx<ffi::ThreadPool>()                                                        \
          .Arg<lstm::Numbers<N>>().Arg<lstm::Floats>().Arg<lstm::Floats>()               \
          .Arg<lstm::Floats>().Arg<lstm::Numbers<N>>().Arg<lstm::Floats>()               \
          .Arg<lstm::Lengths>()                                                          \
          .Ret<lstm::Numbers<N>>().Ret<lstm::Numbers<N>>().Ret<lstm::Floats>()           \
          .Ret<lstm::Floats>().Ret<lstm::Floats>()                                       \
          .Attr<bool>("reverse"))

// kernel_hh, c_0, lengths, gates, cells, d_outputs, d_h_n, d_c_n -> d_gates, d_c_0
#define DEFINE_GATE_GRADIENTS(name, N)                                                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                         \
      name, lstm::GateGradients<N>,                                                      \
      ffi::Ffi::Bind()                                                                   \
          .Ctx<ffi::ThreadPool>()                                                        \
          .Arg<lstm::Floats>().Arg<lstm::Floats>().Arg<lstm::Lengths>()                  \
          .Arg<lstm::Floats>().Arg<lstm::Floats>().Arg<lstm::Numbers<N>>()               \
          .Arg<lstm::Numbers<N>>().Arg<lstm::Floats>()                                   \
          .Ret<lstm::Numbers<N>>().Ret<lstm::Floats>()                                   \
          .Attr<bool>("reverse"))

// x, h_0, outputs, lengths, d_gates -> d_kernel_ih, d_kernel_hh, d_bias
#define DEFINE_WEIGHT_GRADIENTS(name, N)                                                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                         \
      name, lstm::WeightGradients<N>,                                                    \
      ffi::Ffi::Bind()                                                                   \
          .Ctx<ffi::ThreadPool>()                                                        \
          .Arg<lstm::Numbers<N>>().Arg<lstm::Numbers<N>>().Arg<lstm::Numbers<N>>()       \
          .Arg<lstm::Lengths>().Arg<lstm::Numbers<N>>()                                  \
          .Ret<lstm::Floats>().Ret<lstm::Floats>().Ret<lstm::Floats>()                   \
          .Attr<bool>("reverse"))

// d_gates, kernel_ih -> d_x
#define DEFINE_INPUT_GRADIENT(name, N)                                                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                         \
      name, lstm::InputGradient<N>,                                                      \
      ffi::Ffi::Bind()                                                                   \
          .Ctx<ffi::ThreadPool>()                                                        \
          .Arg<lstm::Numbers<N>>().Arg<lstm::Floats>().Ret<lstm::Numbers<N>>())

DEFINE_FORWARD(lstm_forward_float32, lstm::Float32);
DEFINE_GATE_GRADIENTS(lstm_gate_gradients_float32, lstm::Float32);
DEFINE_WEIGHT_GRADIENTS(lstm_weight_gradients_float32, lstm::Float32);
DEFINE_INPUT_GRADIENT(lstm_input_gradient_float32, lstm::Float32);
#if defined(LSTM_HAS_BFLOAT16)
DEFINE_FORWARD(lstm_forward_bfloat16, lstm::Bfloat16);
DEFINE_GATE_GRADIENTS(lstm_gate_gradients_bfloat16, lstm::Bfloat16);
DEFINE_WEIGHT_GRADIENTS(lstm_weight_gradients_bfloat16, lstm::Bfloat16);
DEFINE_INPUT_GRADIENT(lstm_input_gradient_bfloat16, lstm::Bfloat16);
#endif
#if defined(LSTM_HAS_TILES)
DEFINE_FORWARD(lstm_forward_bfloat16_tiles, lstm::TiledBfloat16);
DEFINE_GATE_GRADIENTS(lstm_gate_gradients_bfloat16_tiles, lstm::TiledBfloat16);
DEFINE_WEIGHT_GRADIENTS(lstm_weight_gradients_bfloat16_tiles, lstm::TiledBfloat16);
DEFINE_INPUT_GRADIENT(lstm_input_gradient_bfloat16_tiles, lstm::TiledBfloat16);

// Whether this process may use what is named `_tiles`; it must be asked first.
extern "C" int lstm_ask_for_tiles() { return lstm::AskForTiles(); }
#endif
