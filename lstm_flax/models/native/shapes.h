// What the buffers of a call must be, looked at before anything in them is read or written.

#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace lstm {

// Elements of the largest array: more would have no addresses. Dimensions and their products stay
// below it even where another dimension is zero, so that sums and products of sizes can't overflow.
constexpr int64_t kMostElements = int64_t{1} << 46;

// A dimension of a buffer; -1, which none has, if there is no such dimension or it is too large.
template <typename Buffer>
int64_t Dim(const Buffer& buffer, size_t axis) {
  const auto dims = buffer.dimensions();
  return axis < dims.size() && dims[axis] <= kMostElements ? dims[axis] : -1;
}

template <typename Buffer>
bool IsEmpty(const Buffer& buffer) {
  const auto dims = buffer.dimensions();
  return std::count(dims.begin(), dims.end(), 0) > 0;
}

// Keeps what the first failed check says, in one line; those after it do nothing.
class Checks {
 public:
  // `name` also says in words what shape is needed.
  template <typename Buffer>
  void Shape(const char* name, const Buffer& buffer, std::initializer_list<int64_t> needed) {
    const auto found = buffer.dimensions();
    const bool is_equal =
        std::equal(found.begin(), found.end(), needed.begin(), needed.end());
    if (!error_.empty() || (is_equal && Fits(needed))) return;
    error_ = std::string(name) + " has shape " + Text(found) +
             (is_equal ? ", which is too large" : ", not " + Text(needed));
  }

  // Rows of numbers must be whole words.
  void Words(const char* name, int64_t size, int per_word) {
    if (!error_.empty() || size % per_word == 0) return;
    error_ = std::string(name) + " is " + std::to_string(size) + ", not a multiple of " +
             std::to_string(per_word) + " as this type needs";
  }

  template <typename Lengths>
  void Range(const char* name, const Lengths& lengths, int64_t most) {
    if (!error_.empty()) return;
    const int32_t* begin = lengths.typed_data();
    const int32_t* end = begin + Dim(lengths, 0);
    const int32_t* wrong = std::find_if(begin, end, [&](int64_t n) { return n < 0 || n > most; });
    if (wrong == end) return;
    error_ = std::string(name) + "[" + std::to_string(wrong - begin) + "] is " +
             std::to_string(*wrong) + ", not in 0.." + std::to_string(most);
  }

  bool failed() const { return !error_.empty(); }
  xla::ffi::Error error() const {
    return xla::ffi::Error::InvalidArgument("lstm_flax's kernel: " + error_);
  }

 private:
  static bool Fits(std::initializer_list<int64_t> dims) {
    int64_t room = kMostElements;
    for (const int64_t dim : dims) {
      if (dim > room) return false;
      room /= std::max<int64_t>(dim, 1);
    }
    return true;
  }

  template <typename Dims>
  static std::string Text(const Dims& dims) {
    std::string text;
    for (const int64_t dim : dims) {
      text += (text.empty() ? "" : ", ") + (dim < 0 ? "?" : std::to_string(dim));
    }
    return "[" + text + "]";
  }

  std::string error_;
};

}  // namespace lstm
