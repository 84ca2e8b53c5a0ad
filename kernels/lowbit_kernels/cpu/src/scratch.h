// Memory that a thread keeps between calls, so that a call allocates nothing.
//
// Test builds define LOWBIT_POISON: memory is then full of NaN whenever it is handed out, so that
// what a call reads without having written it shows in its results. Under AddressSanitizer the gaps
// between the parts of one piece, and what lies behind it, must not be touched either.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(LOWBIT_POISON) && defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace lowbit {

constexpr size_t kAlignment = 64;
#ifdef LOWBIT_POISON
constexpr size_t kGap = 64;
#else
constexpr size_t kGap = 0;
#endif

// Bytes of a part of a piece of memory, with the gap after it; the next part is aligned.
inline size_t part_bytes(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment + kGap;
}

// Forbids the gap before `end`, where a part ends.
inline void close_part(const char* memory, size_t end) {
  ASAN_POISON_MEMORY_REGION(memory + end - kGap, kGap);
}

// Memory that only grows.
class Scratch {
 public:
  // Returns `bytes` bytes at a multiple of 64, or null where there is no memory.
  char* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(new (std::nothrow) char[bytes + kAlignment]);
      size_ = memory_ ? bytes : 0;
    }
    if (!memory_) return nullptr;
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    char* begin = memory_.get() + (kAlignment - address % kAlignment) % kAlignment;
#ifdef LOWBIT_POISON
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), size_ + kAlignment);
    std::memset(memory_.get(), 0xff, size_ + kAlignment);
    ASAN_POISON_MEMORY_REGION(begin + bytes, memory_.get() + size_ + kAlignment - begin - bytes);
#endif
    return begin;
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t size_ = 0;
};

}  // namespace lowbit
