// Memory of one operator call: uninitialized, aligned to a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace bacon_fast::contrastive {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size)
      : data_(static_cast<T*>(::operator new(sizeof(T) * size, std::align_val_t(64)))), size_(size) {}

  T* data() const { return data_.get(); }
  std::int64_t size() const { return size_; }
  T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Delete> data_;
  std::int64_t size_ = 0;
};

}  // namespace bacon_fast::contrastive
