// Vectors as wide as the processor's registers, what is computed on them, and the numbers that are
// multiplied: float32, or bfloat16 where the processor multiplies those.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace lstm {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// A tile has kColumns columns, and so has a panel of packed weights.
constexpr int kColumns = 4 * kLanes;

// How many of a tile's four vectors of columns to add up at once. Beside their sums, the registers
// must hold as many vectors of weights and a word of a row: those that are read from memory again
// for each row cost more than the products.
constexpr int CountAtOnce(int rows) {
#if defined(__AVX512F__) || defined(__aarch64__)
  return 4;  // of 32 registers
#else
  return rows <= 2 ? 4 : 2;  // of 16
#endif
}

// For whoever looks at a place in memory until another core writes there.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

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

// The same vector, which the compiler is not to read from memory again at each use.
inline Vec InRegister(Vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
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

// ---- Numbers. Products take them a word of 32 bits at a time, which holds kPerWord of them; rows
// must be whole words.

// Of products by vectors: a tile has up to kTileRows rows, and any number of words is multiplied.
struct ByVectors {
  static constexpr bool kIsTiled = false;
  static constexpr int kTileRows = 6, kWordsAtOnce = 1;
  struct Processor {  // what a thread needs while it multiplies
    Processor() {}
  };
};

struct Float32 : ByVectors {
  typedef float Number;
  static constexpr int kPerWord = 1;

  static Vec Read(const Number* from, int count) { return Load(from, count); }
  static void Write(Number* to, Vec v, int count) { Store(to, v, count); }
  // Words whose numbers are those of `first` and, where there is room for two, of `second`.
  static Vec Join(Vec first, Vec second) { return first; }
  // The same for two rows of so many numbers, in `to` or where they are.
  static const float* JoinRows(const Number* first, const Number* second, int64_t count,
                               float* to) {
    return first;
  }
  static Vec MultiplyAdd(Vec sum, float word, Vec words) { return sum + word * words; }
};

#if defined(__AVX512BF16__)
#define LSTM_HAS_BFLOAT16 1

struct Bfloat16 : ByVectors {
  typedef uint16_t Number;
  static constexpr int kPerWord = 2;

  static Vec Read(const Number* from, int count) {
    __m256i bits{};
    if (count == kLanes) {
      bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    } else {
      std::memcpy(&bits, from, 2 * count);
    }
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  }
  static void Write(Number* to, Vec v, int count) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    if (count == kLanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
    } else {
      std::memcpy(to, &rounded, 2 * count);
    }
  }
  static Vec Join(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    return (Vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static const float* JoinRows(const Number* first, const Number* second, int64_t count,
                               float* to) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t word = first[i] | static_cast<uint32_t>(second[i]) << 16;
      std::memcpy(to + i, &word, 4);
    }
    return to;
  }
  static Vec MultiplyAdd(Vec sum, float word, Vec words) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(word), (__m512bh)words);
  }
};
#endif

// sums[row][v] += the products of a row's words, which word(row, k) reads, with a panel's, which has
// kColumns for each of them.
template <typename N, int kRows, typename Word>
inline __attribute__((always_inline)) void MultiplyWords(Vec (&sums)[kRows][4], const Word& word,
                                                         const float* panel, int64_t words) {
  constexpr int kAtOnce = CountAtOnce(kRows);
  for (int first = 0; first < 4; first += kAtOnce) {
    const float* weights = panel + first * kLanes;
    Vec acc[kRows][kAtOnce];
    for (int r = 0; r < kRows; ++r) std::copy_n(sums[r] + first, kAtOnce, acc[r]);
    for (int64_t k = 0; k < words; ++k, weights += kColumns) {
      Vec w[kAtOnce];
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v) w[v] = InRegister(Load(weights + v * kLanes));
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kAtOnce; ++v) acc[r][v] = N::MultiplyAdd(acc[r][v], word(r, k), w[v]);
      }
    }
    for (int r = 0; r < kRows; ++r) std::copy_n(acc[r], kAtOnce, sums[r] + first);
  }
}

// The same for so many rows that lie in memory word by word.
template <typename N, int kRows>
inline __attribute__((always_inline)) void Multiply(Vec (&sums)[kRows][4],
                                                    const float* const* rows, int count,
                                                    const float* panel, int64_t words) {
  if constexpr (N::kIsTiled) {
    N::MultiplyTile(sums, rows, count, panel, words);
  } else {
    const float* a[kRows];
    std::copy_n(rows, kRows, a);
    MultiplyWords<N, kRows>(sums, [&](int r, int64_t k) { return a[r][k]; }, panel, words);
  }
}

}  // namespace lstm
