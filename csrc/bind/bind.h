// One function for each bind_x.cpp; registration only.
#pragma once

#include <pybind11/pybind11.h>

namespace angelptm {

void bind_checksum(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_heap(pybind11::module_& module);
void bind_io(pybind11::module_& module);
void bind_kernels(pybind11::module_& module);
void bind_pages(pybind11::module_& module);
void bind_timeline(pybind11::module_& module);
void bind_updater(pybind11::module_& module);

}  // namespace angelptm
