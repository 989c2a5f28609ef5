#include "bind/bind.h"

namespace angelptm {

void bind_updater(pybind11::module_&) {}

}  // namespace angelptm
