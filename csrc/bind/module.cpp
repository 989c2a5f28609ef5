// The module: one line for each header's bindings.
#include "bind/bind.h"

PYBIND11_MODULE(angelptm_native, module) {
  module.doc() =
      "Native core of AngelPTM: I/O engine, kernels, pages, updater. Works on addresses; links neither torch nor CUDA.";
  angelptm::bind_checksum(module);
  angelptm::bind_device(module);
  angelptm::bind_heap(module);
  angelptm::bind_io(module);
  angelptm::bind_kernels(module);
  angelptm::bind_pages(module);
  angelptm::bind_timeline(module);
  angelptm::bind_updater(module);
}
