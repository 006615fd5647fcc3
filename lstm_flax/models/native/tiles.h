// Products of whole tiles of bfloat16 numbers, where the processor has a unit for them: Intel's AMX.

#pragma once

#include "vectors.h"

#if defined(__linux__) && defined(LSTM_HAS_BFLOAT16) && defined(__AMX_BF16__)
#define LSTM_HAS_TILES 1

#include <sys/syscall.h>
#include <unistd.h>

namespace lstm {

// Asks the system to let this process use the tiles' registers, which it otherwise may not touch:
// they are large, and every thread that uses them needs room for them.
inline bool AskForTiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // from the kernel's asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// A tile's registers hold 16 rows of 16 words: of sums, a word a column; of what is multiplied, a
// word a pair of numbers. Fewer rows or words are filled up with zeros.
struct TiledBfloat16 : Bfloat16 {
  static constexpr bool kIsTiled = true;
  static constexpr int kTileRows = 16, kWordsAtOnce = 16;

  // Sets up a thread's registers, which may be set up otherwise by whoever else uses them, and
  // gives them back, so that the system need not save them.
  struct Processor {
    Processor() {
      alignas(64) struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes_of_row[16] = {};
        uint8_t rows[16] = {};
      } shape;
      for (int tile = 0; tile < 8; ++tile) shape.bytes_of_row[tile] = 64, shape.rows[tile] = 16;
      static_assert(sizeof shape == 64);
      _tile_loadconfig(&shape);
    }
    ~Processor() { _tile_release(); }
    Processor(const Processor&) = delete;
    Processor& operator=(const Processor&) = delete;
  };

  // sums[row][v] += the products of so many rows' words with a panel's, which has kColumns for each
  // of them and is filled up to whole tiles. The sums of rows that there are not become anything.
  static void MultiplyTile(Vec (&sums)[kTileRows][4], const float* const* rows, int count,
                           const float* panel, int64_t words) {
    constexpr int64_t kStride = 4 * kColumns;  // bytes, of sums and panels
    // Rows that lie at equal distances are read where they are; others are copied.
    const int64_t apart = count > 1 ? rows[1] - rows[0] : 0;
    bool are_even = count == kTileRows;
    for (int r = 2; r < count; ++r) are_even &= rows[r] - rows[r - 1] == apart;
    alignas(64) float copy[kTileRows][kWordsAtOnce];
    if (!are_even) std::memset(copy, 0, sizeof copy);
    Written();
    _tile_loadd(0, sums[0] + 0, kStride);
    _tile_loadd(1, sums[0] + 1, kStride);
    _tile_loadd(2, sums[0] + 2, kStride);
    _tile_loadd(3, sums[0] + 3, kStride);
    for (int64_t k = 0; k < words; k += kWordsAtOnce, panel += kWordsAtOnce * kColumns) {
      const int64_t now = std::min<int64_t>(kWordsAtOnce, words - k);
      if (are_even && now == kWordsAtOnce) {
        _tile_loadd(4, rows[0] + k, 4 * apart);
      } else {
        for (int r = 0; r < count; ++r) {
          std::memcpy(copy[r], rows[r] + k, 4 * now);
          std::memset(copy[r] + now, 0, 4 * (kWordsAtOnce - now));
        }
        Written();
        _tile_loadd(4, copy, sizeof copy[0]);
      }
      _tile_loadd(5, panel, kStride);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, panel + kLanes, kStride);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, panel + 2 * kLanes, kStride);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, panel + 3 * kLanes, kStride);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, sums[0] + 0, kStride);
    _tile_stored(1, sums[0] + 1, kStride);
    _tile_stored(2, sums[0] + 2, kStride);
    _tile_stored(3, sums[0] + 3, kStride);
    Written();
  }

 private:
  // What was written before is in memory: GCC does not know that tiles are loaded from there.
  static void Written() { asm volatile("" ::: "memory"); }
};

}  // namespace lstm

#endif
