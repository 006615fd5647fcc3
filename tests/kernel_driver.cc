// Runs the kernel's work on more threads than the machine has cores, without Python or XLA, so that
// ThreadSanitizer sees all of it; and where helpers don't come, where the system refuses memory, and
// after forks.

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <random>

#include "kernel.cc"

namespace {

std::atomic<int> cores{1};
std::atomic<int> helpers_left{1 << 30};      // that will come
std::atomic<int> allocations_left{1 << 30};  // of vectors

typedef std::vector<float> Array;

struct Results {
  Array outputs, h_n, c_n, gates, cells, d_gates, d_ih, d_hh, d_bias, d_c_0, d_x;
};

// A layer's values and gradients, from inputs that are always the same.
Results Run(lstm::Sizes size, bool reverse) {
  const auto [batch, time, features, hidden] = size;
  std::mt19937 generator(0);
  auto random = [&](int64_t count) {
    Array array(count);
    for (float& value : array) value = generator() / 2147483648.f - 1;
    return array;
  };
  const Array x = random(batch * time * features), kernel_ih = random(features * 4 * hidden);
  const Array kernel_hh = random(hidden * 4 * hidden), bias = random(4 * hidden);
  const Array h_0 = random(batch * hidden), c_0 = random(batch * hidden);
  const Array d_outputs = random(batch * time * hidden);
  std::vector<int32_t> lengths(batch);
  for (int64_t b = 0; b < batch; ++b) lengths[b] = (b * 5 + 3) % (time + 1);

  Results r;
  for (Array* array : {&r.outputs, &r.cells}) array->resize(batch * time * hidden);
  for (Array* array : {&r.gates, &r.d_gates}) array->resize(batch * time * 4 * hidden);
  for (Array* array : {&r.h_n, &r.c_n, &r.d_c_0}) array->resize(batch * hidden);
  r.d_ih.resize(kernel_ih.size()), r.d_hh.resize(kernel_hh.size());
  r.d_bias.resize(bias.size()), r.d_x.resize(x.size());
  const Array zeros(std::max(4 * hidden, features));
  std::vector<std::thread> helpers;
  const lstm::Helpers pool{cores - 1, [&](std::function<void()> task) {
    if (helpers_left-- > 0) helpers.emplace_back(std::move(task));
  }};
  struct JoinAll {
    ~JoinAll() { for (std::thread& helper : helpers) helper.join(); }
    std::vector<std::thread>& helpers;
  } join_all{helpers};
  lstm::RunForward<lstm::Float32>(
      pool,
      {size, x.data(), kernel_ih.data(), kernel_hh.data(), bias.data(), h_0.data(), c_0.data(),
       lengths.data(), reverse, r.outputs.data(), r.h_n.data(), r.c_n.data(), r.gates.data(),
       r.cells.data()});
  lstm::RunGateGradients<lstm::Float32>(
      pool,
      {size, kernel_hh.data(), c_0.data(), lengths.data(), r.gates.data(), r.cells.data(),
       d_outputs.data(), h_0.data(), c_0.data(), reverse, r.d_gates.data(), r.d_c_0.data(),
       zeros.data()});
  lstm::RunWeightGradients<lstm::Float32>(
      pool,
      {size, x.data(), h_0.data(), r.outputs.data(), lengths.data(), r.d_gates.data(), reverse,
       r.d_ih.data(), r.d_hh.data(), r.d_bias.data(), zeros.data()});
  lstm::RunInputGradient<lstm::Float32>(
      pool,
      {batch * time, features, 4 * hidden, r.d_gates.data(), kernel_ih.data(), r.d_x.data()});
  return r;
}

bool operator==(const Results& a, const Results& b) {
  return a.outputs == b.outputs && a.h_n == b.h_n && a.c_n == b.c_n && a.gates == b.gates &&
         a.cells == b.cells && a.d_gates == b.d_gates && a.d_ih == b.d_ih && a.d_hh == b.d_hh &&
         a.d_bias == b.d_bias && a.d_c_0 == b.d_c_0 && a.d_x == b.d_x;
}

int failures = 0;

void Expect(bool is_right, const char* what, int64_t which) {
  if (is_right) return;
  std::printf("%s: wrong for %lld\n", what, static_cast<long long>(which));
  ++failures;
}

// With weights as they lie; with panels that all threads share, or groups of them, or none.
const lstm::Sizes kSizes[] = {
    {1, 5, 7, 70}, {4, 3, 90, 33}, {2, 9, 40, 70}, {9, 4, 30, 70}, {40, 6, 28, 24}};

void ThreadsComputeAsOneDoes() {
  for (const lstm::Sizes& size : kSizes) {
    for (const bool reverse : {false, true}) {
      cores = 1;
      const Results expected = Run(size, reverse);
      for (const int count : {2, 5}) {
        cores = count;
        Expect(Run(size, reverse) == expected, "threads", size.hidden);
      }
    }
  }
}

void HelpersThatDoNotComeAreDoneWithout() {
  for (const lstm::Sizes& size : kSizes) {
    cores = 1;
    const Results expected = Run(size, false);
    cores = 5;
    for (const int left : {0, 1, 2, 3, 5, 8}) {
      helpers_left = left;
      Expect(Run(size, false) == expected, "helpers that do not come", left);
    }
    helpers_left = 1 << 30;
  }
}

void RefusedMemoryIsThrown() {
  cores = 5;
  int thrown = 0;
  for (int left = 0; left < 12; ++left) {
    for (const int64_t batch : {1, 40}) {
      // Larger each time, so that what an earlier call has kept is not enough.
      const lstm::Sizes size{batch, 3, 40, 320 + 16 * left};
      allocations_left = left;
      try {
        Run(size, false);
      } catch (const std::bad_alloc&) {
        ++thrown;
      }
      allocations_left = 1 << 30;
    }
  }
  Expect(thrown > 4 || alignof(lstm::Vec) <= alignof(std::max_align_t), "refused memory", thrown);
  ThreadsComputeAsOneDoes();
}

void ForkedChildrenCompute() {
  cores = 3;
  const Results expected = Run(kSizes[0], false);
  std::atomic<bool> is_done{false};
  std::thread other([&] {
    while (!is_done) Run(kSizes[0], true);
  });
  for (int i = 0; i < 40 && failures == 0; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      _exit(Run(kSizes[0], false) == expected ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    Expect(status == 0, "fork", i);
  }
  is_done = true;
  other.join();
}

void CallersAtOnceCompute() {
  cores = 3;
  const Results expected = Run(kSizes[1], false);
  std::atomic<int> right{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int turn = 0; turn < 5; ++turn) right += Run(kSizes[1], false) == expected;
    });
  }
  for (auto& caller : callers) caller.join();
  Expect(right == 20, "callers at once", right);
}

}  // namespace

// These stand in for the system's, here and in its libraries.

extern "C" int sched_getaffinity(pid_t, size_t size, cpu_set_t* mask) noexcept {
  CPU_ZERO_S(size, mask);
  for (int i = 0; i < cores; ++i) CPU_SET_S(i, size, mask);
  return 0;
}

void* operator new(size_t size, std::align_val_t alignment) {
  void* memory = nullptr;
  if (allocations_left-- <= 0 ||
      posix_memalign(&memory, static_cast<size_t>(alignment), size) != 0) {
    throw std::bad_alloc();
  }
  return memory;
}

void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

int main() {
  lstm::worth_a_thread = 1;
  RefusedMemoryIsThrown();  // first: later calls have memory of earlier ones
  ThreadsComputeAsOneDoes();
  HelpersThatDoNotComeAreDoneWithout();
  CallersAtOnceCompute();
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // whose locks know no forks
  ForkedChildrenCompute();
#endif
  return failures != 0;
}
