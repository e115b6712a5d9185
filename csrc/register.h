// Registers an operation's code when Python imports the module, not when the library is loaded: what goes wrong then, such
// as a schema in bacon_fast/ops/ that has changed since the build, is an ImportError, and takes all registrations back.
#pragma once

#include <torch/library.h>

#include <vector>

namespace bacon_fast {

struct Registration {
  c10::DispatchKey key;
  void (*fill)(torch::Library&);
};

inline std::vector<Registration>& registrations() {
  static std::vector<Registration> all;
  return all;
}

}  // namespace bacon_fast

// As TORCH_LIBRARY_IMPL(bacon_fast, key, m); once a file.
#define BACON_FAST_IMPL(key, m)                                                             \
  static void fill_##key(torch::Library&);                                                  \
  [[maybe_unused]] static const bool filled_##key =                                         \
      (::bacon_fast::registrations().push_back({c10::DispatchKey::key, fill_##key}), true); \
  static void fill_##key(torch::Library& m)
