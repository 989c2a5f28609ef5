#include "bind/bind.h"

namespace angelptm {

void bind_io(pybind11::module_&) {}

}  // namespace angelptm
