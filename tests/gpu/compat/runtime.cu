// A program of the CUDA runtime: runtime threads | graphs | memory | ipc
//
// To be built with the static runtime and per-thread default streams (nvcc -cudart static --default-stream per-thread), which reaches the
// driver by another way than PyTorch does. Prints hashes of what it computed, and checks it against the host.

#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define CALL(call)                                                                                        \
    do {                                                                                                  \
        cudaError_t code_ = (call);                                                                       \
        if (code_ != cudaSuccess) {                                                                       \
            fprintf(stderr, "CUDA error %s (%s) at line %d: %s\n", cudaGetErrorName(code_),               \
                    cudaGetErrorString(code_), __LINE__, #call);                                          \
            exit(1);                                                                                      \
        }                                                                                                 \
    } while (0)

#define REQUIRE(condition)                                                                                \
    do {                                                                                                  \
        if (!(condition)) {                                                                               \
            fprintf(stderr, "error: line %d: not true: %s\n", __LINE__, #condition);                      \
            exit(1);                                                                                      \
        }                                                                                                 \
    } while (0)

using Words = std::vector<uint32_t>;

// Outputs by name, and processes that use the GPU.
static std::vector<std::pair<std::string, uint64_t>> outputs;
static std::vector<int> processes;

static uint64_t hash_of(const void* data, size_t size) {
    uint64_t hash = 1469598103934665603ull;
    for (size_t i = 0; i < size; i++) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211ull;
    return hash;
}

static void output(const std::string& name, const Words& words) {
    outputs.emplace_back(name, hash_of(words.data(), words.size() * sizeof(uint32_t)));
}

static void print_result() {
    printf("\nRESULT {\"exact\": {");
    for (size_t i = 0; i < outputs.size(); i++)
        printf("%s\"%s\": \"%016llx\"", i ? ", " : "", outputs[i].first.c_str(), (unsigned long long)outputs[i].second);
    printf("}, \"numbers\": {}, \"outcomes\": {}, \"facts\": {}, \"processes\": [%d", getpid());
    for (int pid : processes) printf(", %d", pid);
    printf("]}\n");
}

__global__ void mix(uint32_t* words, size_t count, uint32_t by) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        words[i] = words[i] * 1664525u + by;
}

static uint32_t mixed(uint32_t word, uint32_t by) { return word * 1664525u + by; }

// Every block waits for all others, `rounds` times: only a cooperative launch guarantees that they run together.
__global__ void in_step(unsigned* arrived, int rounds) {
    for (int round = 0; round < rounds; round++) {
        if (threadIdx.x == 0) {
            atomicAdd(arrived, 1);
            while (atomicAdd(arrived, 0) < unsigned(round + 1) * gridDim.x) {
            }
        }
        __syncthreads();
    }
}

static Words numbered(size_t count, uint32_t seed) {
    Words words(count);
    for (size_t i = 0; i < count; i++) words[i] = mixed(uint32_t(i), seed);
    return words;
}

static void expect_mixed(const Words& got, const Words& start, uint32_t first, uint32_t times) {
    for (size_t i = 0; i < got.size(); i += 4099) {
        uint32_t word = start[i];
        for (uint32_t n = 0; n < times; n++) word = mixed(word, first + n);
        REQUIRE(got[i] == word);
    }
}

static void threads() {
    constexpr int THREADS = 8, STEPS = 60;
    constexpr size_t COUNT = 2 << 20;
    std::vector<Words> results(THREADS);
    std::vector<std::thread> all;
    for (int t = 0; t < THREADS; t++) {
        all.emplace_back([t, &results] {
            Words start = numbered(COUNT, t);
            uint32_t *device, *pinned;
            CALL(cudaMalloc(&device, COUNT * 4));
            CALL(cudaMallocHost(&pinned, COUNT * 4));
            memcpy(pinned, start.data(), COUNT * 4);
            cudaStream_t stream;
            cudaEvent_t half, end;
            CALL(cudaStreamCreateWithFlags(&stream, t % 2 ? cudaStreamNonBlocking : cudaStreamDefault));
            CALL(cudaEventCreateWithFlags(&half, cudaEventDisableTiming));
            CALL(cudaEventCreate(&end));
            // Half of the work in this thread's own default stream, half in a stream that waits for it.
            CALL(cudaMemcpyAsync(device, pinned, COUNT * 4, cudaMemcpyHostToDevice, 0));
            for (int n = 0; n < STEPS / 2; n++) mix<<<256, 256>>>(device, COUNT, n);
            CALL(cudaEventRecord(half, 0));
            CALL(cudaStreamWaitEvent(stream, half, 0));
            for (int n = STEPS / 2; n < STEPS; n++) mix<<<256, 256, 0, stream>>>(device, COUNT, n);
            CALL(cudaMemcpyAsync(pinned, device, COUNT * 4, cudaMemcpyDeviceToHost, stream));
            CALL(cudaEventRecord(end, stream));
            CALL(cudaEventSynchronize(end));
            CALL(cudaGetLastError());
            results[t].assign(pinned, pinned + COUNT);
            expect_mixed(results[t], start, 0, STEPS);
            CALL(cudaStreamDestroy(stream));
            CALL(cudaEventDestroy(half));
            CALL(cudaEventDestroy(end));
            CALL(cudaFreeHost(pinned));
            CALL(cudaFree(device));
        });
    }
    for (auto& thread : all) thread.join();
    for (int t = 0; t < THREADS; t++) output("thread " + std::to_string(t), results[t]);
}

static Words fetch(const uint32_t* device, size_t count) {
    Words words(count);
    CALL(cudaMemcpy(words.data(), device, count * 4, cudaMemcpyDeviceToHost));
    return words;
}

// Complete for every stream: a copy from pageable memory may return before its data has arrived, and the default stream is
// the thread's own here.
static void upload(uint32_t* to, const Words& from) {
    CALL(cudaMemcpy(to, from.data(), from.size() * 4, cudaMemcpyHostToDevice));
    CALL(cudaDeviceSynchronize());
}

static void graphs() {
    constexpr size_t COUNT = 2 << 20;
    Words start = numbered(COUNT, 7);
    uint32_t *device, *other;
    CALL(cudaMalloc(&device, COUNT * 4));
    CALL(cudaMalloc(&other, COUNT * 4));
    cudaStream_t stream;
    CALL(cudaStreamCreate(&stream));

    // Captured, with memory that is allocated and freed inside the graph.
    upload(device, start);
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CALL(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    uint32_t* inside;
    CALL(cudaMallocAsync(&inside, COUNT * 4, stream));
    CALL(cudaMemcpyAsync(inside, device, COUNT * 4, cudaMemcpyDeviceToDevice, stream));
    for (int n = 0; n < 4; n++) mix<<<256, 256, 0, stream>>>(inside, COUNT, n);
    CALL(cudaMemcpyAsync(device, inside, COUNT * 4, cudaMemcpyDeviceToDevice, stream));
    CALL(cudaFreeAsync(inside, stream));
    CALL(cudaStreamEndCapture(stream, &graph));
    CALL(cudaGraphInstantiate(&executable, graph, 0));
    CALL(cudaGraphUpload(executable, stream));
    for (int n = 0; n < 25; n++) CALL(cudaGraphLaunch(executable, stream));
    CALL(cudaStreamSynchronize(stream));
    output("captured", fetch(device, COUNT));
    CALL(cudaGraphExecDestroy(executable));
    CALL(cudaGraphDestroy(graph));

    // Made by hand.
    upload(device, start);
    CALL(cudaGraphCreate(&graph, 0));
    cudaGraphNode_t copy, kernel, fill;
    CALL(cudaGraphAddMemcpyNode1D(&copy, graph, nullptr, 0, other, device, COUNT * 4, cudaMemcpyDeviceToDevice));
    size_t count = COUNT;
    uint32_t by = 11;
    void* arguments[] = {&other, &count, &by};
    cudaKernelNodeParams parameters = {};
    parameters.func = reinterpret_cast<void*>(mix);
    parameters.gridDim = dim3(256);
    parameters.blockDim = dim3(256);
    parameters.kernelParams = arguments;
    CALL(cudaGraphAddKernelNode(&kernel, graph, &copy, 1, &parameters));
    cudaMemsetParams set = {};
    set.dst = device;
    set.value = 5;
    set.elementSize = 4;
    set.width = 1024;
    set.height = 1;
    CALL(cudaGraphAddMemsetNode(&fill, graph, &kernel, 1, &set));
    CALL(cudaGraphInstantiate(&executable, graph, 0));
    for (int n = 0; n < 10; n++) CALL(cudaGraphLaunch(executable, stream));
    CALL(cudaStreamSynchronize(stream));
    Words got = fetch(other, COUNT);
    REQUIRE(got[0] == mixed(5, 11) && got[5000] == mixed(start[5000], 11));
    output("by hand", got);
    CALL(cudaGraphExecDestroy(executable));
    CALL(cudaGraphDestroy(graph));

    // Blocks that wait for each other, and a launch with attributes.
    unsigned* arrived;
    CALL(cudaMalloc(&arrived, sizeof *arrived));
    CALL(cudaMemset(arrived, 0, sizeof *arrived));
    CALL(cudaDeviceSynchronize());
    int rounds = 50;
    void* in_step_arguments[] = {&arrived, &rounds};
    CALL(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(in_step), dim3(64), dim3(64), in_step_arguments, 0, stream));
    CALL(cudaStreamSynchronize(stream));
    unsigned waited = 0;
    CALL(cudaMemcpy(&waited, arrived, sizeof waited, cudaMemcpyDeviceToHost));
    REQUIRE(waited == 64u * rounds);

    upload(device, start);
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute[1] = {};
    attribute[0].id = cudaLaunchAttributePriority;
    attribute[0].val.priority = 0;
    config.gridDim = dim3(256);
    config.blockDim = dim3(256);
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = 1;
    CALL(cudaLaunchKernelEx(&config, mix, device, COUNT, 3u));
    CALL(cudaStreamSynchronize(stream));
    got = fetch(device, COUNT);
    expect_mixed(got, start, 3, 1);
    output("launched with attributes", got);
    CALL(cudaFree(arrived));
    CALL(cudaFree(device));
    CALL(cudaFree(other));
    CALL(cudaStreamDestroy(stream));
}

__device__ uint32_t symbol[1024];

static void memory() {
    // Rows with a pitch, copied both ways.
    constexpr size_t WIDTH = 1000, HEIGHT = 3000;
    Words start = numbered(WIDTH * HEIGHT, 3), back(WIDTH * HEIGHT);
    uint32_t* rows;
    size_t pitch;
    CALL(cudaMallocPitch(&rows, &pitch, WIDTH * 4, HEIGHT));
    REQUIRE(pitch >= WIDTH * 4 && pitch % 256 == 0);
    CALL(cudaMemcpy2D(rows, pitch, start.data(), WIDTH * 4, WIDTH * 4, HEIGHT, cudaMemcpyHostToDevice));
    CALL(cudaMemset2D(rows, pitch, 0xAB, 16, HEIGHT));
    CALL(cudaMemcpy2D(back.data(), WIDTH * 4, rows, pitch, WIDTH * 4, HEIGHT, cudaMemcpyDeviceToHost));
    REQUIRE(back[0] == 0xABABABABu && back[WIDTH + 4] == start[WIDTH + 4]);
    output("pitched", back);
    CALL(cudaFree(rows));

    // An array with the layout of textures.
    cudaArray_t array;
    cudaChannelFormatDesc format = cudaCreateChannelDesc<uint32_t>();
    CALL(cudaMallocArray(&array, &format, WIDTH, HEIGHT));
    CALL(cudaMemcpy2DToArray(array, 0, 0, start.data(), WIDTH * 4, WIDTH * 4, HEIGHT, cudaMemcpyHostToDevice));
    CALL(cudaMemcpy2DFromArray(back.data(), WIDTH * 4, array, 0, 0, WIDTH * 4, HEIGHT, cudaMemcpyDeviceToHost));
    REQUIRE(back == start);
    CALL(cudaFreeArray(array));

    // Host memory that the GPU writes.
    constexpr size_t COUNT = 1 << 20;
    start = numbered(COUNT, 4);
    uint32_t *mapped, *seen;
    CALL(cudaHostAlloc(&mapped, COUNT * 4, cudaHostAllocMapped));
    memcpy(mapped, start.data(), COUNT * 4);
    CALL(cudaHostGetDevicePointer(&seen, mapped, 0));
    mix<<<256, 256>>>(seen, COUNT, 1);
    CALL(cudaStreamSynchronize(0));
    output("mapped", Words(mapped, mapped + COUNT));
    CALL(cudaFreeHost(mapped));
    Words registered = start;
    CALL(cudaHostRegister(registered.data(), COUNT * 4, cudaHostRegisterDefault));
    mix<<<256, 256>>>(registered.data(), COUNT, 2);
    CALL(cudaStreamSynchronize(0));
    CALL(cudaHostUnregister(registered.data()));
    expect_mixed(registered, start, 2, 1);
    output("registered", registered);

    // In the order of a stream.
    cudaStream_t stream;
    CALL(cudaStreamCreate(&stream));
    Words sums;
    for (int n = 0; n < 40; n++) {
        size_t count = (size_t(n * 7919 % 30) + 1) << 18;
        uint32_t* block;
        CALL(cudaMallocAsync(&block, count * 4, stream));
        CALL(cudaMemsetAsync(block, n, count * 4, stream));
        mix<<<256, 256, 0, stream>>>(block, count, n);
        uint32_t last;
        CALL(cudaMemcpyAsync(&last, block + count - 1, 4, cudaMemcpyDeviceToHost, stream));
        CALL(cudaFreeAsync(block, stream));
        CALL(cudaStreamSynchronize(stream));
        REQUIRE(last == mixed(n * 0x01010101u, n));
        sums.push_back(last);
    }
    output("stream-ordered", sums);

    // Managed memory of the program's own, used from both sides.
    uint32_t* managed;
    CALL(cudaMallocManaged(&managed, COUNT * 16));
    for (size_t i = 0; i < COUNT * 4; i++) managed[i] = uint32_t(i);
    mix<<<256, 256, 0, stream>>>(managed, COUNT * 4, 6);
    CALL(cudaStreamSynchronize(stream));
    for (size_t i = 0; i < COUNT * 4; i += 1000) managed[i] += 1;
    mix<<<256, 256, 0, stream>>>(managed, COUNT * 4, 8);
    CALL(cudaStreamSynchronize(stream));
    REQUIRE(managed[1000] == mixed(mixed(1000, 6) + 1, 8));
    output("managed", Words(managed, managed + COUNT * 4));
    CALL(cudaFree(managed));

    // Variables of a module.
    Words some = numbered(1024, 9);
    CALL(cudaMemcpyToSymbol(symbol, some.data(), 4096));
    void* address;
    CALL(cudaGetSymbolAddress(&address, symbol));
    mix<<<4, 256, 0, stream>>>(static_cast<uint32_t*>(address), 1024, 12);
    CALL(cudaStreamSynchronize(stream));
    CALL(cudaMemcpyFromSymbol(some.data(), symbol, 4096));
    output("variables", some);

    // Too much is refused, and nothing is the worse for it.
    void* nothing = nullptr;
    REQUIRE(cudaMalloc(&nothing, size_t(1) << 46) == cudaErrorMemoryAllocation);
    REQUIRE(cudaGetLastError() == cudaErrorMemoryAllocation && cudaGetLastError() == cudaSuccess);
    size_t free_bytes, total;
    cudaDeviceProp properties;
    CALL(cudaMemGetInfo(&free_bytes, &total));
    CALL(cudaGetDeviceProperties(&properties, 0));
    REQUIRE(free_bytes > 0 && free_bytes <= total && total == properties.totalGlobalMem);
    void* block;
    CALL(cudaMalloc(&block, 64 << 20));
    CALL(cudaMemset(block, 1, 64 << 20));
    CALL(cudaFree(block));
    CALL(cudaStreamDestroy(stream));
    CALL(cudaDeviceSynchronize());
}

constexpr size_t SHARED = 16 << 10;

static std::string hex(const void* data, size_t size) {
    std::string text;
    char two[3];
    for (size_t i = 0; i < size; i++) {
        snprintf(two, sizeof two, "%02x", static_cast<const uint8_t*>(data)[i]);
        text += two;
    }
    return text;
}

template <class T>
static T from_hex(const char* text) {
    T value;
    REQUIRE(strlen(text) == 2 * sizeof value);
    for (size_t i = 0; i < sizeof value; i++) {
        unsigned byte;
        REQUIRE(sscanf(text + 2 * i, "%2x", &byte) == 1);
        reinterpret_cast<uint8_t*>(&value)[i] = uint8_t(byte);
    }
    return value;
}

static void ipc(const char* self) {
    uint32_t* device;
    CALL(cudaMalloc(&device, SHARED * 4));
    Words start = numbered(SHARED, 21);
    CALL(cudaMemcpy(device, start.data(), SHARED * 4, cudaMemcpyHostToDevice));
    cudaEvent_t event;
    CALL(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventInterprocess));
    mix<<<16, 256>>>(device, SHARED, 1);
    CALL(cudaEventRecord(event, 0));
    cudaIpcMemHandle_t block;
    cudaIpcEventHandle_t ready;
    CALL(cudaIpcGetMemHandle(&block, device));
    CALL(cudaIpcGetEventHandle(&ready, event));
    std::string shared = hex(&block, sizeof block), recorded = hex(&ready, sizeof ready);
    fflush(nullptr);
    pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        execl(self, self, "ipc-child", shared.c_str(), recorded.c_str(), nullptr);
        _exit(127);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fprintf(stderr, "error: the other process ended with status %d\n", status);
        exit(1);
    }
    processes.push_back(child);
    Words got = fetch(device, SHARED);
    expect_mixed(got, start, 1, 2);
    output("shared block", got);
    CALL(cudaEventDestroy(event));
    CALL(cudaFree(device));
}

static void ipc_child(const char* shared, const char* recorded) {
    void* device;
    cudaEvent_t event;
    CALL(cudaIpcOpenMemHandle(&device, from_hex<cudaIpcMemHandle_t>(shared), cudaIpcMemLazyEnablePeerAccess));
    CALL(cudaIpcOpenEventHandle(&event, from_hex<cudaIpcEventHandle_t>(recorded)));
    CALL(cudaStreamWaitEvent(0, event, 0));
    mix<<<16, 256>>>(static_cast<uint32_t*>(device), SHARED, 2);
    CALL(cudaStreamSynchronize(0));
    CALL(cudaEventDestroy(event));
    CALL(cudaIpcCloseMemHandle(device));
}

int main(int count, char** arguments) {
    std::string what = count > 1 ? arguments[1] : "";
    if (what == "ipc-child" && count == 4) {
        ipc_child(arguments[2], arguments[3]);
        return 0;
    }
    if (what == "threads") threads();
    else if (what == "graphs") graphs();
    else if (what == "memory") memory();
    else if (what == "ipc") ipc(arguments[0]);
    else {
        fprintf(stderr, "usage: runtime threads | graphs | memory | ipc\n");
        return 2;
    }
    print_result();
    return 0;
}
