// Runs the kernel's work on more threads than the machine has cores, without Python or XLA, so that
// ThreadSanitizer sees all of it; and where helpers don't come, where the system refuses memory, and
// after forks.

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
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

template <typename N>
std::vector<typename N::Number> ToNumbers(const Array& array) {
  std::vector<typename N::Number> numbers(array.size());
  for (size_t i = 0; i < array.size(); ++i) N::Write(&numbers[i], lstm::Vec{array[i]}, 1);
  return numbers;
}

template <typename N>
Array ToFloats(const std::vector<typename N::Number>& numbers) {
  Array array(numbers.size());
  for (size_t i = 0; i < array.size(); ++i) array[i] = N::Read(&numbers[i], 1)[0];
  return array;
}

// A layer's values and gradients, from inputs that are always the same.
template <typename N = lstm::Float32>
Results Run(lstm::Sizes size, bool reverse) {
  typedef std::vector<typename N::Number> Numbers;
  const auto [batch, time, features, hidden] = size;
  std::mt19937 generator(0);
  auto random = [&](int64_t count, float scale = 1) {
    Array array(count);
    for (float& value : array) value = scale * (generator() / 2147483648.f - 1);
    return array;
  };
  const float scale = 1 / std::sqrt(1.f * hidden);
  const Numbers x = ToNumbers<N>(random(batch * time * features));
  const Array kernel_ih = random(features * 4 * hidden, scale);
  const Array kernel_hh = random(hidden * 4 * hidden, scale), bias = random(4 * hidden);
  const Numbers h_0 = ToNumbers<N>(random(batch * hidden));
  const Array c_0 = random(batch * hidden);
  const Numbers d_outputs = ToNumbers<N>(random(batch * time * hidden));
  std::vector<int32_t> lengths(batch);
  for (int64_t b = 0; b < batch; ++b) lengths[b] = (b * 5 + 3) % (time + 1);

  Results r;
  r.cells.resize(batch * time * hidden), r.gates.resize(batch * time * 4 * hidden);
  r.c_n.resize(batch * hidden), r.d_c_0.resize(batch * hidden);
  r.d_ih.resize(kernel_ih.size()), r.d_hh.resize(kernel_hh.size()), r.d_bias.resize(bias.size());
  Numbers outputs(batch * time * hidden), h_n(batch * hidden);
  Numbers d_gates(batch * time * 4 * hidden), d_x(x.size());
  const Numbers zeros(std::max(4 * hidden, features));
  std::vector<std::thread> helpers;
  const lstm::Helpers pool{cores - 1, [&](std::function<void()> task) {
    if (helpers_left-- > 0) helpers.emplace_back(std::move(task));
  }};
  struct JoinAll {
    ~JoinAll() { for (std::thread& helper : helpers) helper.join(); }
    std::vector<std::thread>& helpers;
  } join_all{helpers};
  lstm::RunForward<N>(
      pool,
      {size, x.data(), kernel_ih.data(), kernel_hh.data(), bias.data(), h_0.data(), c_0.data(),
       lengths.data(), reverse, outputs.data(), h_n.data(), r.c_n.data(), r.gates.data(),
       r.cells.data()});
  lstm::RunGateGradients<N>(
      pool,
      {size, kernel_hh.data(), c_0.data(), lengths.data(), r.gates.data(), r.cells.data(),
       d_outputs.data(), h_0.data(), c_0.data(), reverse, d_gates.data(), r.d_c_0.data(),
       zeros.data()});
  lstm::RunWeightGradients<N>(
      pool,
      {size, x.data(), h_0.data(), outputs.data(), lengths.data(), d_gates.data(), reverse,
       r.d_ih.data(), r.d_hh.data(), r.d_bias.data(), zeros.data()});
  lstm::RunInputGradient<N>(
      pool, {batch * time, features, 4 * hidden, d_gates.data(), kernel_ih.data(), d_x.data()});
  r.outputs = ToFloats<N>(outputs), r.h_n = ToFloats<N>(h_n);
  r.d_gates = ToFloats<N>(d_gates), r.d_x = ToFloats<N>(d_x);
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

// Sums in another order, of numbers that are rounded to 8 bits.
bool AreClose(const Array& a, const Array& b) {
  float error = 0, largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error = std::max(error, std::isfinite(a[i]) ? std::abs(a[i] - b[i]) : INFINITY);
    largest = std::max(largest, std::abs(b[i]));
  }
  return error <= 0.02f * largest;
}

// With less than a tile of rows, of words and of units, and with several, and a part of one more.
void TilesComputeAsVectorsDo() {
#if defined(LSTM_HAS_TILES)
  if (!lstm::AskForTiles()) return;
  const lstm::Sizes sizes[] = {
      {1, 5, 8, 70}, {16, 4, 32, 64}, {17, 4, 34, 66}, {40, 40, 28, 48}, {70, 9, 66, 100}};
  for (const lstm::Sizes& size : sizes) {
    for (const bool reverse : {false, true}) {
      cores = 1;
      const Results found = Run<lstm::TiledBfloat16>(size, reverse);
      const Results expected = Run<lstm::Bfloat16>(size, reverse);
      const Array Results::*arrays[] = {
          &Results::outputs, &Results::h_n, &Results::c_n, &Results::gates,
          &Results::cells, &Results::d_gates, &Results::d_ih, &Results::d_hh,
          &Results::d_bias, &Results::d_c_0, &Results::d_x};
      for (const auto array : arrays) {
        Expect(AreClose(found.*array, expected.*array), "tiles", size.hidden);
      }
      for (const int count : {2, 5}) {
        cores = count;
        Expect(Run<lstm::TiledBfloat16>(size, reverse) == found, "threads of tiles", size.hidden);
      }
    }
  }
#endif
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
  TilesComputeAsVectorsDo();
  HelpersThatDoNotComeAreDoneWithout();
  CallersAtOnceCompute();
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // whose locks know no forks
  ForkedChildrenCompute();
#endif
  return failures != 0;
}
