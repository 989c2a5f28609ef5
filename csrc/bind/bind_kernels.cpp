#include "bind/bind.h"

namespace angelptm {

void bind_kernels(pybind11::module_&) {}

}  // namespace angelptm
