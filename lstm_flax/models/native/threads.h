// Threads that share a layer's work, and memory that costs them little.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <functional>
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

// Threads of somebody else's that may help with a call. `schedule` has one of them run a task: at
// once, later, or never, since they may be busy, and a forked process has none of them.
struct Helpers {
  int count = 0;
  std::function<void(std::function<void()>)> schedule;
};

// How many cores' time a container grants this process: its quota, as control groups of version 2
// or 1 have it.
inline int ReadQuota() {
  double quota = -1, period = 0;
  const auto read = [](const char* path, const char* format, double* a, double* b) {
    std::FILE* file = std::fopen(path, "r");
    if (file == nullptr) return;
    if (std::fscanf(file, format, a, b) < 1) *a = -1;
    std::fclose(file);
  };
  read("/sys/fs/cgroup/cpu.max", "%lf %lf", &quota, &period);
  if (period == 0) {
    double unused;
    read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "%lf", &quota, &unused);
    read("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "%lf", &period, &unused);
  }
  return quota > 0 && period > 0 ? std::max(1, static_cast<int>(quota / period + .5)) : 1 << 16;
}

// Cores that this process may use.
inline int CountCores() {
  static const int quota = ReadQuota();
#if defined(__linux__)
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) {
    return std::clamp(CPU_COUNT(&cores), 1, quota);
  }
#endif
  return std::clamp<int>(std::thread::hardware_concurrency(), 1, quota);
}

// Multiplications that are worth a thread of their own: one that is called takes its time to come.
inline double worth_a_thread = 1 << 20;

inline int CountThreads(const Helpers& helpers, double multiplications) {
  const double most = std::min<double>(multiplications / worth_a_thread, 1 + helpers.count);
  return most < 2 ? 1 : std::min<int>(most, CountCores());
}

// Calls work(0) here, and work(1), work(2) ... on helpers if and when they come. What there is to
// do is taken part by part by whoever is there, so that work(0) is done when all is: nobody waits
// for a helper that does not come, or comes late. One that throws, for want of memory, just leaves.
template <typename Work>
void Parallel(const Helpers& helpers, int threads, const Work& work) {
  struct Door {
    std::mutex mutex;
    std::condition_variable all_left;
    std::atomic<int> inside{0};
    bool is_closed = false;
    int entered = 0;
  };
  if (threads < 2) return work(0);
  const auto door = std::make_shared<Door>();
  const auto help = [door, &work] {
    std::unique_lock<std::mutex> lock(door->mutex);
    if (door->is_closed) return;  // `work` may be gone
    ++door->inside;
    const int thread = ++door->entered;
    lock.unlock();
    try {
      work(thread);
    } catch (const std::bad_alloc&) {
    }
    lock.lock();
    if (--door->inside == 0) door->all_left.notify_one();
  };
  struct Close {  // also where work(0) throws
    ~Close() {
      for (int spins = 0; spins < 4000 && door->inside > 0; ++spins) Pause();
      std::unique_lock<std::mutex> lock(door->mutex);
      door->is_closed = true;
      door->all_left.wait(lock, [&] { return door->inside == 0; });
    }
    const std::shared_ptr<Door>& door;
  };
  const Close close{door};
  try {
    for (int i = 1; i < threads; ++i) helpers.schedule(help);
  } catch (const std::bad_alloc&) {  // then there are fewer
  }
  work(0);
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

// Hands out 0..size, in multiples of a unit: large shares first, small ones at the end, so that a
// thread that starts late, or that the system takes the core from, does less and nobody waits.
class Shares {
 public:
  Shares(int64_t size, int64_t unit, int threads) : end_(size), unit_(unit), threads_(threads) {}

  bool Next(Span* share) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const int64_t units = (end_ - begin_ + unit_ - 1) / unit_;
    const int64_t mine = threads_ == 1 ? units : (units + 2 * threads_ - 1) / (2 * threads_);
    *share = {begin_, std::min(end_, begin_ + mine * unit_)};
    begin_ = share->end;
    return share->begin < share->end;
  }

 private:
  std::mutex mutex_;
  int64_t begin_ = 0;
  const int64_t end_, unit_;
  const int threads_;
};

// Of so many units of work: some for each thread, so that whoever is early finds more to do.
inline int64_t CountParts(int threads, int64_t units) {
  return threads == 1 ? 1 : std::min<int64_t>(4 * threads, units);
}

// Steps of a few parts each, every one of which needs all parts of the step before it. A thread
// begins with the same parts at each step, which it has in its cache, and then takes what is left.
// So it waits only for parts that others are in the middle of.
class Steps {
 public:
  Steps(int64_t steps, int64_t parts, int threads)
      : steps_(steps), parts_(parts), threads_(threads), next_(parts) {}

  // Calls work(step, part).
  template <typename Work>
  void Run(int thread, const Work& work) {
    const int64_t first = thread % threads_ * parts_ / threads_;
    int64_t step = done_.load(std::memory_order_acquire) / parts_;
    for (; step < steps_; ++step) {
      for (int64_t n = 0; n < parts_; ++n) {
        const int64_t part = (first + n) % parts_;
        int64_t expected = step;
        if (next_[part].step.load(std::memory_order_relaxed) == step &&
            next_[part].step.compare_exchange_strong(expected, step + 1)) {
          work(step, part);
          done_.fetch_add(1, std::memory_order_acq_rel);
        }
      }
      const int64_t needed = (step + 1) * parts_;
      for (int spins = 0; done_.load(std::memory_order_acquire) < needed; ++spins) {
        spins < 2000 ? Pause() : std::this_thread::yield();
      }
    }
  }

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> step{0};  // that nobody has begun
  };
  const int64_t steps_, parts_;
  const int threads_;
  alignas(64) std::atomic<int64_t> done_{0};  // parts, of all steps
  std::vector<Next> next_;
};

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
