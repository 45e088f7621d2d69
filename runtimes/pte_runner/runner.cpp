// Runs one .pte file in a process of its own: `runner JOBDIR`. It needs neither Python nor torch.
//
// JOBDIR holds model.pte, job.txt and in_<i>.bin: the samples of input i one after another, in C order and little
// endian. job.txt is a list of words, each key followed by its values:
//
//   threads N          size of the thread pool, and how many cores to pin to: the fastest
//   runs R             how many samples there are
//   inputs K           followed, for each input, by: DTYPE RANK d1 … dRANK
//   count N            how many runs to mark, by getppid before and after, for an emulator that counts instructions
//   trace N            how many runs to record for trace.bin, an ETDump with the time of each op
//   memory BYTES       how much more memory the file may take than this process has before it is loaded
//   stall SECONDS      how long the job may go without progress: then SIGALRM ends it
//   timing 0 | timing 1 WARMUP_RUNS SECONDS MIN_RUNS MAX_RUNS
//
// It leaves out_<i>.bin in the same form, log.txt with what ExecuTorch printed, and last of all result.json. Meanwhile
// it prints how long it may take until the next such line or the end: `edgekit allows 21 s`. Clock, warm-up and
// pinning follow edgekit/measure.py.

#include <fcntl.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <executorch/devtools/etdump/etdump_flatcc.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr_maker.h>
#include <executorch/runtime/platform/runtime.h>

// The wheel ships the library of the thread pool without its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t count);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::aten::ScalarType;
using executorch::etdump::ETDumpGen;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::MethodMeta;
using executorch::runtime::Program;
using executorch::runtime::Tag;
using Clock = std::chrono::steady_clock;

constexpr const char* METHOD = "forward";
constexpr int TIMED_SAMPLES = 8;
constexpr int64_t WARMUP_RUN_CAP_NS = 50'000'000;
constexpr int WARMUP_RUNS_AT_LEAST = 3;
constexpr double TELL_EVERY_MS = 1000;  // runs may be short and many

int channel = -1;  // standard output as it was at the start

struct Dtype {
  ScalarType type;
  const char* name;
  size_t bytes;
};
constexpr Dtype DTYPES[] = {
    {ScalarType::Byte, "uint8", 1},  {ScalarType::Char, "int8", 1},    {ScalarType::Short, "int16", 2},
    {ScalarType::Int, "int32", 4},   {ScalarType::Long, "int64", 8},   {ScalarType::Half, "float16", 2},
    {ScalarType::Float, "float32", 4}, {ScalarType::Double, "float64", 8}, {ScalarType::Bool, "bool", 1},
};

struct Info {
  Dtype dtype;
  std::vector<int32_t> shape;

  size_t bytes() const {
    size_t total = dtype.bytes;
    for (int32_t size : shape) total *= static_cast<size_t>(size);
    return total;
  }
};

struct Job {
  int threads = 1;
  size_t runs = 0;
  std::vector<std::pair<std::string, std::vector<int32_t>>> inputs;
  int count = 0;
  int trace = 0;
  rlim_t memory = 0;
  double stall_s = 0;
  bool timed = false;
  int64_t warmup_runs = 0, min_runs = 0, max_runs = 0;
  double seconds = 0;
};

// What the user can mend: `kind` says which message the host words, `detail` what happened.
struct Failure {
  std::string kind;
  std::string detail;
};

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (unsigned char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 0x20 || c > 0x7e) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      out += escape;
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + "\"";
}

template <typename T>
std::string numbers(const std::vector<T>& values) {
  std::string out = "[";
  for (const T& value : values) {
    char text[40];
    std::snprintf(text, sizeof text, "%s%.9g", out.size() > 1 ? "," : "", static_cast<double>(value));
    out += text;
  }
  return out + "]";
}

std::string described(const std::vector<Info>& infos) {
  std::string out = "[";
  for (const Info& info : infos) {
    if (out.size() > 1) out += ",";
    out += "{\"dtype\":" + quoted(info.dtype.name) + ",\"shape\":" + numbers(info.shape) + "}";
  }
  return out + "]";
}

void stage(const char* name) { std::fprintf(stderr, "edgekit stage: %s\n", name); }

void check(Error error, const char* kind) {
  if (error != Error::Ok) throw Failure{kind, executorch::runtime::to_string(error)};
}

template <typename T>
T word(std::istream& in) {
  T value;
  if (!(in >> value)) throw Failure{"job", "job.txt is not whole"};
  return value;
}

Job read_job(const std::string& path) {
  std::ifstream in(path);
  Job job;
  std::string key;
  while (in >> key) {
    if (key == "threads") {
      job.threads = word<int>(in);
    } else if (key == "runs") {
      job.runs = word<size_t>(in);
    } else if (key == "inputs") {
      for (int left = word<int>(in); left > 0; --left) {
        std::string dtype = word<std::string>(in);
        std::vector<int32_t> shape(word<size_t>(in));
        for (int32_t& size : shape) size = word<int32_t>(in);
        job.inputs.emplace_back(dtype, shape);
      }
    } else if (key == "count") {
      job.count = word<int>(in);
    } else if (key == "trace") {
      job.trace = word<int>(in);
    } else if (key == "memory") {
      job.memory = word<rlim_t>(in);
    } else if (key == "stall") {
      job.stall_s = word<double>(in);
    } else if (key == "timing") {
      job.timed = word<int>(in) != 0;
      if (job.timed) {
        job.warmup_runs = word<int64_t>(in);
        job.seconds = word<double>(in);
        job.min_runs = word<int64_t>(in);
        job.max_runs = word<int64_t>(in);
      }
    } else {
      throw Failure{"job", "job.txt has the unknown key " + key};
    }
  }
  if (job.runs == 0 || job.memory == 0 || job.stall_s <= 0) throw Failure{"job", "job.txt is not whole"};
  return job;
}

long number_in(const std::string& path, long otherwise) {
  std::ifstream in(path);
  long value;
  return in >> value ? value : otherwise;
}

// Hardware threads before their siblings, fast cores before slow ones (big.LITTLE), lower numbers first.
std::tuple<int, long, int> rank(int cpu) {
  std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu);
  long first = number_in(folder + "/topology/thread_siblings_list", cpu);
  return {first != cpu, -number_in(folder + "/cpufreq/cpuinfo_max_freq", 0), cpu};
}

std::vector<int> pin(const Job& job) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return {};
  std::vector<int> chosen;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) chosen.push_back(cpu);
  std::sort(chosen.begin(), chosen.end(), [](int a, int b) { return rank(a) < rank(b); });
  if (chosen.size() > static_cast<size_t>(job.threads)) chosen.resize(job.threads);
  std::sort(chosen.begin(), chosen.end());
  CPU_ZERO(&set);
  for (int cpu : chosen) CPU_SET(cpu, &set);
  return sched_setaffinity(0, sizeof set, &set) == 0 ? chosen : std::vector<int>{};
}

long long status_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line))
    if (line.rfind(key, 0) == 0) return std::atoll(line.c_str() + key.size()) * 1024;
  return -1;
}

// Holds this process to so many bytes more than it has: a file of a few kB can ask for terabytes.
void limit_memory(rlim_t more) {
  const long long held = status_bytes("VmData:");
  rlimit limit;
  if (held < 0 || getrlimit(RLIMIT_DATA, &limit) != 0) return;
  limit.rlim_cur = std::min(limit.rlim_max, static_cast<rlim_t>(held) + more);
  setrlimit(RLIMIT_DATA, &limit);
}

const Dtype& dtype_of(ScalarType type) {
  for (const Dtype& dtype : DTYPES)
    if (dtype.type == type) return dtype;
  throw Failure{"load", "it has a tensor of scalar type " + std::to_string(static_cast<int>(type)) +
                            ", which numpy has no dtype for"};
}

template <typename Sizes>
Info info_of(ScalarType type, const Sizes& sizes) {
  return {dtype_of(type), std::vector<int32_t>(sizes.begin(), sizes.end())};
}

std::vector<Info> inputs_of(const MethodMeta& meta) {
  std::vector<Info> infos;
  for (size_t i = 0; i < meta.num_inputs(); ++i) {
    auto tensor = meta.input_tensor_meta(i);
    check(tensor.error(), "load");
    infos.push_back(info_of(tensor->scalar_type(), tensor->sizes()));
  }
  return infos;
}

std::vector<Info> outputs_of(const MethodMeta& meta) {
  std::vector<Info> infos;
  for (size_t i = 0; i < meta.num_outputs(); ++i) {
    auto tensor = meta.output_tensor_meta(i);
    check(tensor.error(), "load");
    infos.push_back(info_of(tensor->scalar_type(), tensor->sizes()));
  }
  return infos;
}

// One sample of every input, and the tensors on its memory.
struct Sample {
  std::vector<std::vector<char>> bytes;
  std::vector<TensorPtr> tensors;
  std::vector<EValue> values;
};

Sample read_sample(std::vector<std::ifstream>& files, const std::vector<Info>& infos, size_t index) {
  Sample sample;
  for (size_t i = 0; i < infos.size(); ++i) {
    size_t size = infos[i].bytes();
    std::vector<char> bytes(std::max<size_t>(size, 1));
    files[i].clear();
    files[i].seekg(static_cast<std::streamoff>(index * size));
    if (!files[i].read(bytes.data(), static_cast<std::streamsize>(size)))
      throw Failure{"job", "in_" + std::to_string(i) + ".bin is not whole"};
    sample.bytes.push_back(std::move(bytes));
    sample.tensors.push_back(from_blob(sample.bytes.back().data(), infos[i].shape, infos[i].dtype.type));
    sample.values.emplace_back(*sample.tensors.back());
  }
  return sample;
}

double since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

std::vector<EValue> run(Module& module, const Sample& sample) {
  auto result = module.execute(METHOD, sample.values);
  check(result.error(), "run");
  return std::move(result.get());
}

// Appends one run; returns what the tensor is.
Info append(std::ofstream& file, const EValue& value) {
  if (!value.isTensor()) throw Failure{"run", "an output is no tensor"};
  const auto& tensor = value.toTensor();
  errno = 0;
  if (!file.write(static_cast<const char*>(tensor.const_data_ptr()), static_cast<std::streamsize>(tensor.nbytes())))
    throw Failure{"write", std::strerror(errno ? errno : EIO)};
  return info_of(tensor.scalar_type(), tensor.sizes());
}

// Ends this process with SIGALRM unless it gets to the next call of this within the time that the job may stall, and
// three times the seconds that are expected. Who started it is told as well, and ends one that stands still.
void watch(const Job& job, double expected_s = 0) {
  static Clock::time_point told;
  static unsigned before = 0;
  const unsigned seconds = static_cast<unsigned>(std::min(job.stall_s + 3 * expected_s, 1e6)) + 1;
  alarm(seconds);
  if (seconds != before || since(told) > TELL_EVERY_MS) {
    dprintf(channel, "edgekit allows %u s\n", seconds);
    before = seconds;
    told = Clock::now();
  }
}

std::vector<double> time_runs(Module& module, const std::vector<Sample>& samples, const Job& job) {
  size_t next = 0;
  auto call = [&] { run(module, samples[next++ % samples.size()]); };
  const auto warmup_end = Clock::now() + std::chrono::nanoseconds(job.warmup_runs * WARMUP_RUN_CAP_NS);
  for (int64_t done = 0; done < job.warmup_runs; ++done) {
    if (done >= WARMUP_RUNS_AT_LEAST && Clock::now() >= warmup_end) break;
    call();
  }
  std::vector<double> milliseconds;
  milliseconds.reserve(static_cast<size_t>(job.max_runs));
  const auto end = Clock::now() + std::chrono::nanoseconds(static_cast<int64_t>(job.seconds * 1e9));
  while (static_cast<int64_t>(milliseconds.size()) < job.max_runs) {
    const auto start = Clock::now();
    call();
    const auto stop = Clock::now();
    milliseconds.push_back(std::chrono::duration<double, std::milli>(stop - start).count());
    if (stop >= end && static_cast<int64_t>(milliseconds.size()) >= job.min_runs) break;
  }
  return milliseconds;
}

// Runs the model with ExecuTorch's own profiler, in a program of its own, and leaves what that says in trace.bin.
void record(const std::string& folder, const std::vector<Sample>& samples, int runs) {
  auto tracer = std::make_unique<ETDumpGen>();
  ETDumpGen* dump = tracer.get();
  Module module(folder + "/model.pte", Module::LoadMode::Mmap, std::move(tracer));
  check(module.load_method(METHOD), "load");
  for (int done = 0; done < runs; ++done) run(module, samples[static_cast<size_t>(done) % samples.size()]);
  const auto result = dump->get_etdump_data();
  if (result.buf == nullptr) throw Failure{"run", "its profiler recorded nothing"};
  errno = 0;
  std::ofstream file(folder + "/trace.bin", std::ios::binary);
  file.write(static_cast<const char*>(result.buf), static_cast<std::streamsize>(result.size));
  file.close();
  std::free(result.buf);
  if (!file) throw Failure{"write", std::strerror(errno ? errno : EIO)};
}

std::string run_job(const std::string& folder) {
  const Job job = read_job(folder + "/job.txt");
  const std::vector<int> cpus = pin(job);

  stage("load");
  watch(job);
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool != nullptr && pool->get_thread_count() != static_cast<size_t>(job.threads))
    pool->_unsafe_reset_threadpool(static_cast<uint32_t>(job.threads));
  limit_memory(job.memory);
  auto start = Clock::now();
  Module module(folder + "/model.pte", Module::LoadMode::Mmap);
  check(module.load(Program::Verification::InternalConsistency), "load");
  auto names = module.method_names();
  check(names.error(), "load");
  if (names->count(METHOD) == 0) throw Failure{"load", "the program has no method 'forward'"};
  check(module.load_method(METHOD), "load");
  const double load_ms = since(start);
  auto meta = module.method_meta(METHOD);
  check(meta.error(), "load");
  const std::vector<Info> inputs = inputs_of(*meta), outputs = outputs_of(*meta);

  stage("run");
  bool fits = inputs.size() == job.inputs.size();
  for (size_t i = 0; fits && i < inputs.size(); ++i)
    fits = inputs[i].dtype.name == job.inputs[i].first && inputs[i].shape == job.inputs[i].second;
  if (!fits) throw Failure{"feeds", described(inputs)};
  std::vector<std::ifstream> feeds;
  for (size_t i = 0; i < inputs.size(); ++i)
    feeds.emplace_back(folder + "/in_" + std::to_string(i) + ".bin", std::ios::binary);
  std::vector<std::ofstream> files;
  for (size_t i = 0; i < outputs.size(); ++i)
    files.emplace_back(folder + "/out_" + std::to_string(i) + ".bin", std::ios::binary);
  std::vector<Info> given;
  double first_ms = 0, slowest_s = 0;
  for (size_t index = 0; index < job.runs; ++index) {
    const Sample sample = read_sample(feeds, inputs, index);
    watch(job);
    start = Clock::now();
    const std::vector<EValue> results = run(module, sample);
    slowest_s = std::max(slowest_s, since(start) / 1e3);
    if (index == 0) first_ms = since(start);
    if (results.size() != outputs.size()) throw Failure{"run", "it gives another number of outputs than it declares"};
    for (size_t i = 0; i < results.size(); ++i) {
      Info info = append(files[i], results[i]);
      if (index == 0) given.push_back(info);
      if (given[i].shape != info.shape) throw Failure{"run", "the shape of an output changes between samples"};
    }
  }
  for (std::ofstream& file : files) {
    errno = 0;
    file.close();
    if (!file) throw Failure{"write", std::strerror(errno ? errno : EIO)};
  }

  std::vector<double> latency_ms;
  if (job.timed) {
    stage("time");
    watch(job, job.seconds + static_cast<double>(job.warmup_runs) * WARMUP_RUN_CAP_NS * 1e-9 +
                   static_cast<double>(job.min_runs + WARMUP_RUNS_AT_LEAST + 2) * slowest_s);
    std::vector<Sample> samples;
    for (size_t index = 0; index < std::min<size_t>(job.runs, TIMED_SAMPLES); ++index)
      samples.push_back(read_sample(feeds, inputs, index));
    latency_ms = time_runs(module, samples, job);
  }
  if (job.count > 0) {
    const Sample sample = read_sample(feeds, inputs, 0);
    watch(job, job.count * slowest_s);
    run(module, sample);
    for (int done = 0; done < job.count; ++done) {
      getppid();
      run(module, sample);
      getppid();
    }
  }
  if (job.trace > 0) {
    stage("trace");
    watch(job, job.trace * slowest_s);
    std::vector<Sample> samples;
    for (size_t index = 0; index < std::min<size_t>(job.runs, TIMED_SAMPLES); ++index)
      samples.push_back(read_sample(feeds, inputs, index));
    record(folder, samples, job.trace);
  }
  utsname system;
  uname(&system);
  const long long peak = status_bytes("VmHWM:");
  return "{\"ok\":true,\"latency_ms\":" + numbers(latency_ms) + ",\"load_ms\":" + std::to_string(load_ms) +
         ",\"first_ms\":" + std::to_string(first_ms) +
         ",\"peak_rss_bytes\":" + (peak < 0 ? "null" : std::to_string(peak)) + ",\"cpus\":" + numbers(cpus) +
         ",\"machine\":" + quoted(system.machine) + ",\"inputs\":" + described(inputs) +
         ",\"outputs\":" + described(outputs) + ",\"given\":" + described(given) + "}\n";
}

bool write_file(const std::string& path, const std::string& text) {
  const std::string unfinished = path + ".tmp";
  {
    std::ofstream file(unfinished, std::ios::binary);
    file << text;
    file.close();
    if (!file) return false;
  }
  return std::rename(unfinished.c_str(), path.c_str()) == 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s JOBDIR\n", arguments[0]);
    return 2;
  }
  const std::string folder = arguments[1];
  std::signal(SIGXFSZ, SIG_IGN);  // a limit on file sizes is an error of write(), as a full disk is
  std::signal(SIGPIPE, SIG_IGN);
  channel = dup(STDOUT_FILENO);
  const int console = dup(STDERR_FILENO);
  const int log = open((folder + "/log.txt").c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (log >= 0) {
    dup2(log, STDOUT_FILENO);
    dup2(log, STDERR_FILENO);
  }
  executorch::runtime::runtime_init();
  std::string result;
  int code = 0;
  try {
    result = run_job(folder);
  } catch (const Failure& failure) {
    code = 1;
    const std::string detail = failure.kind == "feeds" ? failure.detail : quoted(failure.detail);
    result = "{\"ok\":false,\"kind\":" + quoted(failure.kind) + ",\"detail\":" + detail + "}\n";
    for (int i = 0; failure.kind == "write" && std::remove((folder + "/out_" + std::to_string(i) + ".bin").c_str()) == 0;)
      ++i;  // makes room for the result
  } catch (const std::bad_alloc&) {
    code = 1;
    result = "{\"ok\":false,\"kind\":\"run\",\"detail\":\"std::bad_alloc\"}\n";
  }
  if (!write_file(folder + "/result.json", result)) {
    dprintf(console, "cannot write the result: %s\n", std::strerror(errno));
    return 3;
  }
  return code;
}
