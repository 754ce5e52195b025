// OpenCL for TVM's runtime, which its wheels lack: memory, and the kernels of a step's library, on one device through its driver.
// Loaded beside libtvm_runtime.so in the process that serves; `mest-compile serve --opencl` compiles it. One in-order queue, so that nothing
// waits but what is read back. Memory is an OpenCL buffer as a whole: TVM adds no offsets to it where a runtime does not offer that.
#define CL_TARGET_OPENCL_VERSION 120
#include <CL/cl.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace ffi = tvm::ffi;

static const char* kFlags = "-cl-std=CL1.2";

static void Check(cl_int code, const char* what) {
  if (code != CL_SUCCESS) TVM_FFI_THROW(RuntimeError) << "OpenCL driver: " << what << " failed with code " << code;
}

// The machine's device: a GPU if there is one, else whatever there is, that its driver compiles for. A driver may refuse processors that
// are newer than itself.
class Driver {
 public:
  cl_device_id device = nullptr;
  cl_context context = nullptr;
  cl_command_queue queue = nullptr;

  static Driver& Here() {
    static Driver* driver = new Driver;  // never let go: drivers do not like that at exit
    return *driver;
  }

  std::string Text(cl_device_info what) const {
    char text[256] = "";
    Check(clGetDeviceInfo(device, what, sizeof text, text, nullptr), "clGetDeviceInfo");
    return text;
  }

  size_t Number(cl_device_info what) const {
    size_t number = 0;  // of 4 or 8 bytes, little-endian like every device that TVM's packets reach
    Check(clGetDeviceInfo(device, what, sizeof number, &number, nullptr), "clGetDeviceInfo");
    return number;
  }

 private:
  Driver() {
    for (cl_device_type kind : {cl_device_type(CL_DEVICE_TYPE_GPU), cl_device_type(CL_DEVICE_TYPE_ALL)}) {
      cl_uint platforms = 0;
      clGetPlatformIDs(0, nullptr, &platforms);
      std::vector<cl_platform_id> found(platforms);
      if (platforms) clGetPlatformIDs(platforms, found.data(), nullptr);
      for (cl_platform_id platform : found) {
        cl_uint count = 0;
        if (clGetDeviceIDs(platform, kind, 0, nullptr, &count) != CL_SUCCESS) continue;
        std::vector<cl_device_id> devices(count);
        clGetDeviceIDs(platform, kind, count, devices.data(), nullptr);
        for (cl_device_id each : devices)
          if (Open(each)) return;
      }
    }
  }

  bool Open(cl_device_id each) {
    cl_int code;
    cl_context opened = clCreateContext(nullptr, 1, &each, nullptr, nullptr, &code);
    if (code != CL_SUCCESS) return false;
    const char* nothing = "__kernel void nothing(__global float* x) { x[0] = 0; }";
    cl_program program = clCreateProgramWithSource(opened, 1, &nothing, nullptr, &code);
    bool compiles = code == CL_SUCCESS && clBuildProgram(program, 1, &each, kFlags, nullptr, nullptr) == CL_SUCCESS;
    if (program) clReleaseProgram(program);
    cl_command_queue opened_queue = compiles ? clCreateCommandQueue(opened, each, 0, &code) : nullptr;
    if (!opened_queue) return clReleaseContext(opened), false;
    device = each, context = opened, queue = opened_queue;
    return true;
  }
};

static cl_mem Memory(const void* pointer) { return static_cast<cl_mem>(const_cast<void*>(pointer)); }

class OpenclDevice final : public tvm::runtime::DeviceAPI {
 public:
  static OpenclDevice* Here() {
    static OpenclDevice* device = new OpenclDevice;
    return device;
  }

  void SetDevice(tvm::Device) final {}

  void GetAttr(tvm::Device asked, tvm::runtime::DeviceAttrKind kind, ffi::Any* result) final {
    Driver& driver = Driver::Here();
    bool there = driver.device && asked.device_id == 0;
    if (kind == tvm::runtime::kExist) *result = int64_t(there);
    if (!there) return;
    if (kind == tvm::runtime::kDeviceName) *result = ffi::String(driver.Text(CL_DEVICE_NAME));
    if (kind == tvm::runtime::kDriverVersion) *result = ffi::String(driver.Text(CL_DRIVER_VERSION));
    if (kind == tvm::runtime::kMaxThreadsPerBlock) *result = int64_t(driver.Number(CL_DEVICE_MAX_WORK_GROUP_SIZE));
    if (kind == tvm::runtime::kMaxSharedMemoryPerBlock) *result = int64_t(driver.Number(CL_DEVICE_LOCAL_MEM_SIZE));
  }

  void* AllocDataSpace(tvm::Device, size_t size, size_t, DLDataType) final {
    cl_int code;
    cl_mem memory = clCreateBuffer(Driver::Here().context, CL_MEM_READ_WRITE, std::max<size_t>(size, 16), nullptr, &code);
    if (code != CL_SUCCESS) TVM_FFI_THROW(RuntimeError) << "OpenCL driver: no buffer of " << size << " bytes, code " << code;
    return memory;
  }

  void FreeDataSpace(tvm::Device, void* pointer) final { Check(clReleaseMemObject(Memory(pointer)), "clReleaseMemObject"); }

  // Scratch of one call is the next call's: the queue runs them one after another.
  void* AllocWorkspace(tvm::Device device, size_t size, DLDataType hint) final {
    auto found = free_.lower_bound(size);
    if (found == free_.end() || found->first > 2 * size) return AllocDataSpace(device, size, 0, hint);
    cl_mem memory = found->second;
    free_.erase(found);
    return memory;
  }

  void FreeWorkspace(tvm::Device, void* pointer) final {
    size_t size = 0;
    Check(clGetMemObjectInfo(Memory(pointer), CL_MEM_SIZE, sizeof size, &size, nullptr), "clGetMemObjectInfo");
    free_.emplace(size, Memory(pointer));
  }

  void StreamSync(tvm::Device, TVMStreamHandle) final { Check(clFinish(Driver::Here().queue), "what was asked for before"); }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t size, tvm::Device from_device,
                      tvm::Device to_device, DLDataType, TVMStreamHandle) final {
    cl_command_queue queue = Driver::Here().queue;
    bool there = from_device.device_type == kDLOpenCL, here = to_device.device_type == kDLOpenCL;
    if (size == 0) return;
    if (there && here)
      Check(clEnqueueCopyBuffer(queue, Memory(from), Memory(to), from_offset, to_offset, size, 0, nullptr, nullptr), "a copy");
    else if (there)
      Check(clEnqueueReadBuffer(queue, Memory(from), CL_TRUE, from_offset, size, static_cast<char*>(to) + to_offset, 0, nullptr, nullptr),
            "what was asked for before, or a copy from the device,");
    else
      Check(clEnqueueWriteBuffer(queue, Memory(to), CL_TRUE, to_offset, size, static_cast<const char*>(from) + from_offset, 0, nullptr,
                                 nullptr),
            "a copy to the device");
  }

 private:
  std::multimap<size_t, cl_mem> free_;
};

// A kernel's arguments, as bits of each with 0 for a buffer, and which size each number behind them is: 0 to 2 for groups along x, y, z,
// 3 to 5 for threads.
struct Signature {
  std::vector<DLDataType> types;
  std::vector<int> sizes;
};

// Reads what TVM's code generator for OpenCL writes: format, signatures, source; sizes are 64 bits, little-endian.
class Reader {
 public:
  explicit Reader(const ffi::Bytes& bytes) : place_(bytes.data()), left_(bytes.size()) {}

  template <typename T>
  T Plain() {
    T value;
    std::memcpy(&value, Take(sizeof(T)), sizeof(T));
    return value;
  }

  std::string Text() {
    uint64_t size = Plain<uint64_t>();
    return std::string(Take(size), size);
  }

  Signature Function() {
    Signature found;
    Text();  // its name again
    for (uint64_t left = Plain<uint64_t>(); left; left--) {
      found.types.push_back({});
      found.types.back().code = Plain<uint8_t>();
      found.types.back().bits = Plain<uint8_t>();
      found.types.back().lanes = Plain<uint16_t>();
    }
    for (uint64_t left = Plain<uint64_t>(); left; left--) {
      std::string tag = Text(), kind = tag.substr(0, tag.find('.'));
      int axis = tag.back() - 'x';
      if ((kind != "blockIdx" && kind != "threadIdx") || axis < 0 || axis > 2)
        TVM_FFI_THROW(RuntimeError) << "a kernel is launched with " << tag << ", which OpenCL kernels of mest-compile are not";
      found.sizes.push_back(axis + (kind == "threadIdx" ? 3 : 0));
    }
    for (uint64_t left = Plain<uint64_t>(); left; left--) Plain<int32_t>();  // tags that are CUDA's
    return found;
  }

 private:
  const char* Take(size_t size) {
    if (size > left_) TVM_FFI_THROW(RuntimeError) << "the library's OpenCL code is cut off, or of another version of TVM";
    const char* taken = place_;
    place_ += size, left_ -= size;
    return taken;
  }

  const char* place_;
  size_t left_;
};

class OpenclModule final : public ffi::ModuleObj {
 public:
  explicit OpenclModule(const ffi::Bytes& bytes) {
    Reader reader(bytes);
    std::string format = reader.Text();
    if (format != "cl") TVM_FFI_THROW(RuntimeError) << "the library's OpenCL code is " << format << ", not source";
    for (uint64_t left = reader.Plain<uint64_t>(); left; left--) {
      std::string name = reader.Text();
      signatures_[name] = reader.Function();
    }
    source_ = reader.Text();
  }

  const char* kind() const final { return "opencl"; }
  int GetPropertyMask() const final { return ffi::Module::kRunnable; }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    auto found = signatures_.find(std::string(name));
    if (found == signatures_.end()) return std::nullopt;
    Build();
    cl_int code;
    cl_kernel kernel = clCreateKernel(program_, found->first.c_str(), &code);
    Check(code, found->first.c_str());
    auto launch = [kernel, label = found->first, signature = found->second](ffi::PackedArgs arguments, ffi::Any*) {
      Launch(kernel, label, signature, reinterpret_cast<const TVMFFIAny*>(arguments.data()));
    };
    return ffi::Function::FromPacked(launch);
  }

 private:
  void Build() {
    if (program_) return;
    Driver& driver = Driver::Here();
    const char* text = source_.c_str();
    cl_int code;
    cl_program program = clCreateProgramWithSource(driver.context, 1, &text, nullptr, &code);
    Check(code, "clCreateProgramWithSource");
    code = clBuildProgram(program, 1, &driver.device, kFlags, nullptr, nullptr);
    if (code != CL_SUCCESS) {
      std::string said(4096, '\0');
      clGetProgramBuildInfo(program, driver.device, CL_PROGRAM_BUILD_LOG, said.size(), &said[0], nullptr);
      TVM_FFI_THROW(RuntimeError) << "the OpenCL driver's compiler refuses the kernels, code " << code << ": " << said.c_str();
    }
    program_ = program;
  }

  static void Launch(cl_kernel kernel, const std::string& name, const Signature& signature, const TVMFFIAny* arguments) {
    cl_uint place = 0;
    for (const DLDataType& type : signature.types) {
      int32_t narrow = static_cast<int32_t>(arguments[place].v_int64);
      float real = static_cast<float>(arguments[place].v_float64);
      if (type.code == kDLOpaqueHandle)
        Check(clSetKernelArg(kernel, place, sizeof(cl_mem), &arguments[place].v_ptr), name.c_str());
      else if (type.code == kDLFloat && type.bits == 32)
        Check(clSetKernelArg(kernel, place, sizeof real, &real), name.c_str());
      else if (type.code == kDLInt && type.bits == 32)
        Check(clSetKernelArg(kernel, place, sizeof narrow, &narrow), name.c_str());
      else if (type.code == kDLInt && type.bits == 64)
        Check(clSetKernelArg(kernel, place, sizeof(int64_t), &arguments[place].v_int64), name.c_str());
      else
        TVM_FFI_THROW(RuntimeError) << name << " takes an argument of a type that no kernel of mest-compile has";
      place++;
    }
    size_t sizes[6] = {1, 1, 1, 1, 1, 1}, threads[3];
    for (int which : signature.sizes) sizes[which] = static_cast<size_t>(arguments[place++].v_int64);
    for (int axis = 0; axis < 3; axis++) threads[axis] = sizes[axis] * sizes[axis + 3];
    Check(clEnqueueNDRangeKernel(Driver::Here().queue, kernel, 3, nullptr, threads, sizes + 3, 0, nullptr, nullptr), name.c_str());
  }

  std::unordered_map<std::string, Signature> signatures_;
  std::string source_;
  cl_program program_ = nullptr;
};

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def_packed("device_api.opencl", [](ffi::PackedArgs, ffi::Any* result) { *result = static_cast<void*>(OpenclDevice::Here()); })
      .def("ffi.Module.load_from_bytes.opencl",
           [](const ffi::Bytes& bytes) { return ffi::Module(ffi::make_object<OpenclModule>(bytes)); });
}
