#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bind/bind.h"
#include "device/cuda_stream.h"
#include "device/late_device.h"

namespace py = pybind11;

namespace angelptm {

namespace {

// Addresses by the functions' names in the runtime. Throws std::invalid_argument for one that is missing.
device::CudaRuntime runtime_of(const std::map<std::string, std::uint64_t>& addresses) {
  const auto set = [&](auto& function, const char* name) {
    const auto found = addresses.find(name);
    if (found == addresses.end() || found->second == 0)
      throw std::invalid_argument(std::string("the CUDA runtime has no ") + name);
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found->second);
  };
  device::CudaRuntime runtime{};
  set(runtime.set_device, "cudaSetDevice");
  set(runtime.memcpy_async, "cudaMemcpyAsync");
  set(runtime.memset_async, "cudaMemsetAsync");
  set(runtime.stream_create, "cudaStreamCreateWithFlags");
  set(runtime.stream_destroy, "cudaStreamDestroy");
  set(runtime.stream_synchronize, "cudaStreamSynchronize");
  set(runtime.stream_wait_event, "cudaStreamWaitEvent");
  set(runtime.event_create, "cudaEventCreateWithFlags");
  set(runtime.event_record, "cudaEventRecord");
  set(runtime.event_query, "cudaEventQuery");
  set(runtime.event_destroy, "cudaEventDestroy");
  set(runtime.error_string, "cudaGetErrorString");
  return runtime;
}

const std::byte* at(std::uint64_t address) { return reinterpret_cast<const std::byte*>(address); }

}  // namespace

void bind_device(py::module_& module) {
  using device::CopyStream;
  using device::LateDevice;
  using Release = py::call_guard<py::gil_scoped_release>;
  py::register_exception<device::DeviceError>(module, "DeviceError", PyExc_RuntimeError);
  // Copies by address. See csrc/device/copy_stream.h for who may call what.
  py::class_<CopyStream, std::shared_ptr<CopyStream>>(module, "CopyStream")
      .def("computed", &CopyStream::computed, py::arg("stream") = 0, Release())
      .def("wait_for", &CopyStream::wait_for, py::arg("computed"), Release())
      .def(
          "copy",
          [](CopyStream& stream, std::uint64_t to, std::uint64_t from, std::uint64_t bytes) {
            stream.copy(reinterpret_cast<std::byte*>(to), at(from), bytes);
          },
          py::arg("to"), py::arg("from_"), py::arg("bytes"), Release())
      .def("mark", &CopyStream::mark, Release())
      .def("passed", &CopyStream::passed, py::arg("mark"), Release());
  // runtime: {name: address} of libcudart's functions
  py::class_<device::CudaStream, CopyStream, std::shared_ptr<device::CudaStream>>(module, "CudaStream")
      .def(py::init([](const std::map<std::string, std::uint64_t>& runtime, int index) {
             return std::make_shared<device::CudaStream>(runtime_of(runtime), index);
           }),
           py::arg("runtime"), py::arg("device"));
  py::class_<LateDevice>(module, "LateDevice")
      .def(py::init<std::uint64_t, std::uint32_t>(), py::arg("seed"), py::arg("most_delay_us"))
      .def("add_stream", &LateDevice::add_stream, py::arg("name"), py::keep_alive<0, 1>())
      .def(
          "begin_use",
          [](LateDevice& device, std::uint64_t start, std::uint64_t bytes, const std::string& what) {
            device.begin_use(at(start), bytes, what);
          },
          py::arg("start"), py::arg("bytes"), py::arg("what"), Release())
      .def(
          "end_use",
          [](LateDevice& device, std::uint64_t start, std::uint64_t bytes) { device.end_use(at(start), bytes); },
          py::arg("start"), py::arg("bytes"), Release());
}

}  // namespace angelptm
