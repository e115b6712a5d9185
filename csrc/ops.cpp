// The Python module. Each operation's files register its code with torch.ops.bacon_fast; the schema, written once, is in
// bacon_fast/ops/ beside the operation's fake and derivative, and is defined before this module is imported.
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "register.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "bacon_fast's native operators; importing this module registers them with torch.ops.bacon_fast";
  std::vector<torch::Library> libraries;  // what they hold is registered as long as they live
  for (const auto& [key, fill] : bacon_fast::registrations()) {
    libraries.emplace_back(torch::Library::IMPL, "bacon_fast", key, __FILE__, __LINE__);
    fill(libraries.back());
  }
  static const std::vector<torch::Library> kept = std::move(libraries);
#ifdef BACON_FAST_WITH_CUDA
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
#ifdef _OPENMP
  m.attr("built_with_openmp") = true;
#else
  m.attr("built_with_openmp") = false;
#endif
}
