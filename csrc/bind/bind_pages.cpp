#include "bind/bind.h"

namespace angelptm {

void bind_pages(pybind11::module_&) {}

}  // namespace angelptm
