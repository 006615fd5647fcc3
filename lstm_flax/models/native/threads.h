// Threads that share a layer's work, and memory that costs them little.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

#include "vectors.h"

namespace lstm {

// All of `count` threads wait for the last; they meet after each time step, so they spin.
class Barrier {
 public:
  struct Broken : std::exception {};

  explicit Barrier(int count) : count_(count) {}

  // One of them won't come: the others throw Broken in place of waiting for ever.
  void Break() { is_broken_.store(true, std::memory_order_release); }

  void Wait() {
    if (count_ == 1) return;
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (is_broken_.load(std::memory_order_acquire)) throw Broken();
      if (spins > 2000) std::this_thread::yield();
    }
  }

 private:
  const int count_;
  std::atomic<int> arrived_{0}, turn_{0};
  std::atomic<bool> is_broken_{false};
};

// Cores that this process may use.
inline int CountCores() {
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
inline Span Part(int64_t size, int64_t unit, int parts, int index) {
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
// have the same rows, and a barrier to meet at. What one of them throws is thrown here. Where the
// system refuses a thread, there are fewer.
template <typename Work>
void Parallel(int64_t batch, int64_t unit, int64_t panels, int64_t panel_bytes, const Work& work,
              int threads = CountCores()) {
  constexpr int64_t kCacheBytes = 1 << 22;
  if (batch == 0 || panels == 0) return;
  int over_rows = std::min<int64_t>(threads, (batch + unit - 1) / unit);
  int over_panels = std::min<int64_t>(threads / over_rows, panels);
  while (over_rows > 1 && over_panels < panels &&
         panels * panel_bytes / over_panels > kCacheBytes) {
    over_rows = (over_rows + 1) / 2;
    over_panels = std::min<int64_t>(threads / over_rows, panels);
  }
  const int wanted = over_rows * over_panels;
  Shares all({0, batch}, unit, over_rows);
  std::vector<std::unique_ptr<Barrier>> barriers;
  for (int i = 0; i < over_rows; ++i) barriers.push_back(std::make_unique<Barrier>(over_panels));
  // Threads that share panels can't do without each other: none begins before all are there.
  Barrier start(over_panels == 1 ? 1 : wanted);
  std::mutex mutex;
  std::exception_ptr failure;
  auto run = [&](int index) {
    const int row_part = index / over_panels, panel_part = index % over_panels;
    try {
      start.Wait();
      Shares own(Part(batch, unit, over_rows, row_part), unit, 1);
      Shares& shares = over_panels == 1 ? all : own;
      work(Part(panels, 1, over_panels, panel_part),
           [&](Span* rows) { return shares.Next(rows); }, *barriers[row_part]);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(mutex);
      if (!failure) failure = std::current_exception();
      barriers[row_part]->Break();
    }
  };
  std::vector<std::thread> others;
  others.reserve(wanted - 1);
  try {
    for (int i = 1; i < wanted; ++i) others.emplace_back(run, i);
  } catch (const std::exception&) {
    start.Break();
  }
  const int started = 1 + others.size();
  const bool is_enough = over_panels == 1 || started == wanted;
  if (is_enough) run(0);
  for (auto& other : others) other.join();
  if (!is_enough) return Parallel(batch, unit, panels, panel_bytes, work, started);
  if (failure) std::rethrow_exception(failure);
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
    if (storage_.size() * sizeof(Vec) > kLargest) return;
    const std::lock_guard<std::mutex> guard(mutex_);
    try {
      kept_.push_back(std::move(storage_));
    } catch (const std::bad_alloc&) {  // then it is not kept
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() { return reinterpret_cast<float*>(storage_.data()); }

 private:
  static constexpr size_t kLargest = 1 << 25;  // bytes that are worth keeping
  inline static std::mutex mutex_;
  inline static std::vector<std::vector<Vec>> kept_;
  // Nobody holds the mutex while the process forks: in the child, there would be none to unlock it.
  inline static const int registered_ = pthread_atfork(
      [] { mutex_.lock(); }, [] { mutex_.unlock(); }, [] { mutex_.unlock(); });
  std::vector<Vec> storage_;
};

// Ask for large pages: a fresh array of many small ones costs as much to map as to fill. XLA lays
// its arrays side by side in one fresh block, so the large pages at the ends are asked for too; for
// whoever else has memory there, it is a hint.
inline void PreferLargePages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  if (bytes < kPage / 4) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace lstm
