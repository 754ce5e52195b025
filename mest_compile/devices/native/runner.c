/* Calls one kernel of a shared library with arrays from a file and writes them back: runner LIBRARY SYMBOL ARGUMENTS RESULTS

   A compiled kernel needs very little of TVM: a calling convention, and five functions that it finds through pointers or by name. They
   are below, so this program and a kernel are all that a device needs to hold. Work that is meant for threads is done by one.

   ARGUMENTS: int32 count, then for each array int32 type code (0 int, 2 float), int32 bits, int64 elements, and the elements.
   RESULTS: the elements of all arrays after the call, one array behind the other.
   The call stands between the system calls 0x7ffe(1) and 0x7ffe(2), which no kernel has and the qemu plugin sees. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ALIGNMENT 64 /* of arrays, as TVM allocates them */
#define TENSOR 7     /* type index of a DLTensor pointer */
#define CPU 1

/* TVM's calling convention (tvm/ffi/c_api.h) and DLPack's tensor (dlpack.h). */
typedef struct { int32_t type_index; uint32_t zero; union { int64_t integer; double real; void *pointer; } value; } Any;
typedef struct { uint8_t code, bits; uint16_t lanes; } Type;
typedef struct { void *data; struct { int32_t type, id; } device; int32_t ndim; Type type; int64_t *shape, *strides; uint64_t byte_offset; } Tensor;
typedef struct { void *sync_handle; int32_t num_task; } Environment;
typedef int (*Task)(int task, Environment *environment, void *data);
typedef int (*Kernel)(void *self, const Any *arguments, int32_t count, Any *result);

static void fail(const char *what, const char *about) {
  fprintf(stderr, "%s: %s\n", what, about);
  exit(1);
}

/* What a kernel calls. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; i++) fputs(parts[i] ? parts[i] : "", stderr);
  fputc('\n', stderr);
}

static int parallel_launch(Task task, void *data, int num_task) {
  Environment one = {NULL, num_task > 0 ? num_task : 1};
  for (int i = 0; i < one.num_task; i++) {
    int code = task(i, &one, data);
    if (code) return code;
  }
  return 0;
}

static int parallel_barrier(int task, Environment *environment) { return 0; }

static void *alloc_workspace(int device, int id, uint64_t bytes, int code, int bits) {
  void *memory = NULL;
  return posix_memalign(&memory, ALIGNMENT, bytes ? bytes : 1) ? NULL : memory;
}

static int free_workspace(int device, int id, void *memory) { free(memory); return 0; }

static void set_pointer(void *library, const char *name, void *function) {
  void **pointer = dlsym(library, name);
  if (pointer) *pointer = function;
}

static void read_bytes(FILE *file, void *to, size_t bytes) {
  if (fread(to, 1, bytes, file) != bytes) fail("arguments", "the file ends too early");
}

int main(int argc, char **argv) {
  if (argc != 5) fail("usage", "runner LIBRARY SYMBOL ARGUMENTS RESULTS");
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("library", dlerror());
  set_pointer(library, "__TVMBackendParallelLaunch", parallel_launch);
  set_pointer(library, "__TVMBackendParallelBarrier", parallel_barrier);
  set_pointer(library, "__TVMBackendAllocWorkspace", alloc_workspace);
  set_pointer(library, "__TVMBackendFreeWorkspace", free_workspace);
  char name[512];
  snprintf(name, sizeof name, "__tvm_ffi_%s", argv[2]);
  Kernel kernel = (Kernel)dlsym(library, name);
  if (!kernel) fail("library has no function", name);

  FILE *file = fopen(argv[3], "rb");
  if (!file) fail("arguments cannot be read", argv[3]);
  int32_t count;
  read_bytes(file, &count, sizeof count);
  Any *arguments = calloc(count, sizeof *arguments), result = {0};
  Tensor *tensors = calloc(count, sizeof *tensors);
  size_t *bytes = calloc(count, sizeof *bytes);
  for (int i = 0; i < count; i++) {
    int32_t code, bits;
    int64_t *shape = malloc(2 * sizeof *shape);
    read_bytes(file, &code, sizeof code);
    read_bytes(file, &bits, sizeof bits);
    read_bytes(file, shape, sizeof *shape);
    shape[1] = 1; /* the stride */
    bytes[i] = (size_t)shape[0] * bits / 8;
    void *data;
    if (posix_memalign(&data, ALIGNMENT, bytes[i] + ALIGNMENT)) fail("memory", "there is too little");
    read_bytes(file, data, bytes[i]);
    tensors[i] = (Tensor){data, {CPU, 0}, 1, {(uint8_t)code, (uint8_t)bits, 1}, shape, shape + 1, 0};
    arguments[i].type_index = TENSOR;
    arguments[i].value.pointer = &tensors[i];
  }
  fclose(file);

  syscall(0x7ffe, 1L);
  int code = kernel(NULL, arguments, count, &result);
  syscall(0x7ffe, 2L);
  if (code) fail("the kernel failed", argv[2]);

  file = fopen(argv[4], "wb");
  if (!file) fail("results cannot be written", argv[4]);
  for (int i = 0; i < count; i++)
    if (fwrite(tensors[i].data, 1, bytes[i], file) != bytes[i]) fail("results cannot be written", argv[4]);
  if (fclose(file)) fail("results cannot be written", argv[4]);
  return 0;
}
