// TVM's RPC server without Python, for an emulated device: libtvm_ffi, libtvm_runtime and libtvm_runtime_extra only.
// usage: rpcd PORT TRACKER-PORT KEY LIBRARY...   listens and looks for its tracker on 127.0.0.1; the libraries are loaded first
// Each session runs in a process of its own, so that a kernel that crashes takes its session with it and nothing else.
// Protocol: tvm/rpc/base.py, server.py and tracker.py of apache-tvm 0.27.
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

namespace ffi = tvm::ffi;

static constexpr int kServerMagic = 0xff271, kTrackerMagic = 0x2f271, kMismatch = kServerMagic + 2;
static std::string work_folder;

// TVM's timer interface, declared again: the wheel's tvm/runtime/timer.h includes a header that the wheel lacks.
struct TimerInterface : public ffi::Object {
  virtual void Start() = 0;
  virtual void Stop() = 0;
  virtual int64_t SyncAndGetElapsedNanos() = 0;
  virtual ~TimerInterface() {}
  static constexpr const bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO("runtime.TimerNode", TimerInterface, ffi::Object);
};

// Where executed instructions are counted (the emulator's plugin writes the file that DEVICE_ICOUNT names), one counts as a nanosecond.
static volatile uint64_t* instructions = nullptr;

class InstructionTimer : public TimerInterface {
 public:
  void Start() final { begun_ = *instructions; }
  void Stop() final { ended_ = *instructions; }
  int64_t SyncAndGetElapsedNanos() final { return static_cast<int64_t>(ended_ - begun_); }
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("mest.InstructionTimer", InstructionTimer, TimerInterface);

 private:
  uint64_t begun_ = 0, ended_ = 0;
};

static bool Receive(int end, void* into, size_t size) {
  char* place = static_cast<char*>(into);
  while (size) {
    ssize_t got = recv(end, place, size, 0);
    if (got <= 0) return false;
    place += got;
    size -= got;
  }
  return true;
}

static bool Send(int end, const void* from, size_t size) {
  const char* place = static_cast<const char*>(from);
  while (size) {
    ssize_t sent = send(end, place, size, MSG_NOSIGNAL);
    if (sent <= 0) return false;
    place += sent;
    size -= sent;
  }
  return true;
}

static bool SendInt(int end, int value) { return Send(end, &value, 4); }

static bool SendText(int end, const std::string& text) {
  return SendInt(end, static_cast<int>(text.size())) && Send(end, text.data(), text.size());
}

static bool ReceiveText(int end, std::string* text) {
  int size;
  if (!Receive(end, &size, 4) || size < 0 || size > (1 << 20)) return false;
  text->resize(size);
  return Receive(end, text->data(), size);
}

static sockaddr_in Here(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

static bool Tell(int tracker, const std::string& request) {
  std::string answer;
  return SendText(tracker, request) && ReceiveText(tracker, &answer) && answer == "0";
}

// A connection to the tracker that knows us; -1: none.
static int MeetTracker(int tracker_port, int port, const std::string& key) {
  int tracker = socket(AF_INET, SOCK_STREAM, 0), magic = 0;
  sockaddr_in address = Here(tracker_port);
  if (connect(tracker, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 && SendInt(tracker, kTrackerMagic) &&
      Receive(tracker, &magic, 4) && magic == kTrackerMagic &&
      Tell(tracker, "[5, {\"key\": \"server:" + key + "\", \"addr\": [\"127.0.0.1\", " + std::to_string(port) + "]}]"))
    return tracker;
  close(tracker);
  return -1;
}

// limit_seconds: after which the session is ended, whatever it is doing; 0: never.
static void Serve(int client, int limit_seconds) {
  std::string name = (std::filesystem::temp_directory_path() / "rpcdXXXXXX").string();
  work_folder = mkdtemp(name.data());
  pid_t session = fork();
  if (session == 0) {
    if (chdir(work_folder.c_str())) _exit(3);
    alarm(limit_seconds);
    try {
      ffi::Function::GetGlobalRequired("rpc.ServerLoop")(client);
    } catch (const std::exception& problem) {
      fprintf(stderr, "session: %s\n", problem.what());
      _exit(2);
    }
    _exit(0);
  }
  int status = 0;
  waitpid(session, &status, 0);
  fprintf(stderr, "session ended with status 0x%x\n", status);
  std::error_code ignored;
  std::filesystem::remove_all(work_folder, ignored);
  close(client);
}

// Whether a client with our match key came; false: the tracker is gone, or gave the key away and nobody came.
static bool WaitForClient(int listener, int tracker, const std::string& key, const std::string& match) {
  for (int missed = 0;;) {
    pollfd waiting{listener, POLLIN, 0};
    if (poll(&waiting, 1, 2000) <= 0) {
      std::string pending;
      if (!SendText(tracker, "[7]") || !ReceiveText(tracker, &pending)) return false;
      missed = pending.find(match) == std::string::npos ? missed + 1 : 0;
      if (missed > 3) return true;
      continue;
    }
    int client = accept(listener, nullptr, nullptr), magic = 0, one = 1;
    if (client < 0) continue;
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    std::string said;
    if (!Receive(client, &magic, 4) || magic != kServerMagic || !ReceiveText(client, &said)) {
      close(client);
    } else if (said.substr(0, said.find(' ')) != "client:" + match) {
      SendInt(client, kMismatch);
      close(client);
    } else {
      SendInt(client, kServerMagic);
      SendText(client, "server:" + key);
      size_t option = said.find("-timeout=");
      Serve(client, option == std::string::npos ? 0 : static_cast<int>(atof(said.c_str() + option + 9)) + 1);
      return true;
    }
  }
}

int main(int count, char** arguments) {
  if (count < 4) return fprintf(stderr, "usage: rpcd PORT TRACKER-PORT KEY LIBRARY...\n"), 2;
  int port = atoi(arguments[1]), tracker_port = atoi(arguments[2]);
  std::string key = arguments[3];
  for (int i = 4; i < count; i++)
    if (!dlopen(arguments[i], RTLD_NOW | RTLD_GLOBAL)) return fprintf(stderr, "%s\n", dlerror()), 1;
  tvm::ffi::reflection::GlobalDef()
      .def("tvm.rpc.server.workpath", [](const ffi::String& path) { return ffi::String(work_folder + "/" + std::string(path)); })
      .def("tvm.rpc.server.load_module",
           [](const ffi::String& path) { return ffi::Module::LoadFromFile(work_folder + "/" + std::string(path)); });
  if (const char* counter = getenv("DEVICE_ICOUNT")) {
    int file = open(counter, O_RDONLY);
    void* mapped = file < 0 ? MAP_FAILED : mmap(nullptr, 4096, PROT_READ, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED) return perror(counter), 1;
    instructions = static_cast<volatile uint64_t*>(mapped);
    ffi::Function::SetGlobal("runtime.timer.cpu", ffi::Function::FromPacked([](ffi::PackedArgs, ffi::Any* result) {
                               *result = ffi::ObjectRef(ffi::make_object<InstructionTimer>());
                             }), true);
    tvm::ffi::reflection::GlobalDef().def("mest.clock", [] { return ffi::String("instructions"); });
  }
  int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1, tracker = -1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  sockaddr_in address = Here(port);
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address) || listen(listener, 4)) return perror("bind"), 1;
  srand48(getpid());
  for (;;) {
    if (tracker < 0 && (tracker = MeetTracker(tracker_port, port, key)) < 0) {
      usleep(200000);
      continue;
    }
    std::string match = key + ":" + std::to_string(drand48());
    bool known = Tell(tracker, "[3, \"" + key + "\", [" + std::to_string(port) + ", \"" + match + "\"], \"127.0.0.1\"]");
    if (known) fprintf(stderr, "ready %s\n", match.c_str());
    if (!known || !WaitForClient(listener, tracker, key, match)) {
      close(tracker);
      tracker = -1;
    }
  }
}
