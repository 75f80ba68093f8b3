// CUDA's words for a C++ compiler, so that the kernels of src/cuda run where there is no GPU.
//
// Blocks run one after the other. The threads of a block are coroutines of one thread: each runs until it waits for
// others, and a warp until it waits for other warps. They take turns from the first to the last or the other way round,
// so that a kernel that forgets to wait computes something else in one of both orders. Copies to shared memory happen
// when they are waited for in one, at once in the other.

#define CUDA_ON_HOST

#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <math.h>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char *name = dynamic_shared.data() + 16 - (size_t)dynamic_shared.data() % 16

using std::max;
using std::min;

struct Dimensions {
    unsigned x, y, z;
};

static thread_local Dimensions threadIdx, blockIdx, blockDim, gridDim;
static thread_local std::vector<unsigned char> dynamic_shared;

inline void require_shared(size_t bytes) {
    if (dynamic_shared.size() < bytes + 16) {
        fprintf(stderr, "a kernel needs %zu bytes of dynamic shared memory, not %zu\n", bytes,
                dynamic_shared.size() - 16);
        abort();
    }
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline double __longlong_as_double(long long bits) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

namespace host {

const int WARP_LANES = 32;
const size_t STACK = 64 * 1024;

// Threads that wait for each other: the number of times that all have come, and how many have come since.
struct Barrier {
    unsigned times, arrived;
};

// What a lane tells the others; a new one does not overwrite what slower lanes still read.
struct Exchange {
    unsigned char words[2][WARP_LANES][32];
};

struct Copy {
    void *to;
    const void *from;
    unsigned group;
    void make() const { from ? memcpy(to, from, 16) : memset(to, 0, 16); }
};

struct Thread {
    std::vector<unsigned char> stack;
    ucontext_t context;
    jmp_buf place;
    bool started, ended;
    // What it waits for, until this many times.
    Barrier *barrier;
    unsigned until, exchanges, groups;
    std::vector<Copy> copies;
};

static thread_local std::vector<Thread> threads;
static thread_local std::vector<Barrier> warps;
static thread_local std::vector<Exchange> exchanges;
static thread_local Barrier block;
static thread_local bool copies_late;
static thread_local jmp_buf scheduler;
static thread_local ucontext_t scheduler_context;
static thread_local void (*body)(void *);
static thread_local void *closure;

// Not inlined: a thread's own variables are looked up again after it was away.
__attribute__((noinline)) Thread &current() {
    return threads[threadIdx.x];
}

__attribute__((noinline)) void wait(Barrier &barrier, unsigned count) {
    Thread &own = current();
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        barrier.times++;
        return;
    }
    own.barrier = &barrier;
    own.until = barrier.times + 1;
    if (_setjmp(own.place) == 0) {
        _longjmp(scheduler, 1);
    }
}

inline void wait_for_warp() {
    wait(warps[threadIdx.x / WARP_LANES], WARP_LANES);
}

// Tells the other lanes a value, and returns what all have told.
template <typename T> const unsigned char (*tell(const T &value))[32] {
    static_assert(sizeof(T) <= 32, "longer than what lanes exchange");
    Exchange &exchange = exchanges[threadIdx.x / WARP_LANES];
    unsigned turn = current().exchanges++ % 2;
    memcpy(exchange.words[turn][threadIdx.x % WARP_LANES], &value, sizeof(T));
    wait_for_warp();
    return exchange.words[turn];
}

template <typename T> T told(const unsigned char (*words)[32], int lane) {
    T value;
    memcpy(&value, words[lane], sizeof(T));
    return value;
}

void enter() {
    body(closure);
    current().ended = true;
    _longjmp(scheduler, 1);
}

void resume(unsigned index) {
    Thread &thread = threads[index];
    threadIdx = {index, 0, 0};
    thread.barrier = nullptr;
    if (_setjmp(scheduler) == 0) {
        if (thread.started) {
            _longjmp(thread.place, 1);
        }
        thread.started = true;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, enter, 0);
        swapcontext(&scheduler_context, &thread.context);
    }
}

// Lets every lane of a warp run until it waits or ends; how many could.
size_t run_lanes(size_t first, bool backward, size_t &ended) {
    size_t moved = 0;
    for (size_t i = 0; i < WARP_LANES; i++) {
        size_t index = first + (backward ? WARP_LANES - 1 - i : i);
        const Thread &thread = threads[index];
        bool waits = thread.barrier && (int)(thread.barrier->times - thread.until) < 0;
        if (!thread.ended && !waits) {
            resume(index);
            moved++;
            ended += thread.ended;
        }
    }
    return moved;
}

// Runs one block; false if its threads wait for ever.
bool run_block(size_t shared_bytes, bool backward) {
    // What nobody has written is no number.
    dynamic_shared.assign(shared_bytes + 16, 0xff);
    block = {0, 0};
    std::fill(warps.begin(), warps.end(), Barrier{0, 0});
    for (Thread &thread : threads) {
        thread.started = thread.ended = false;
        thread.barrier = nullptr;
        thread.exchanges = thread.groups = 0;
        thread.copies.clear();
    }
    for (size_t ended = 0; ended < threads.size();) {
        bool moved = false;
        for (size_t i = 0; i < warps.size(); i++) {
            size_t first = (backward ? warps.size() - 1 - i : i) * WARP_LANES;
            // A warp runs until it waits for others.
            while (run_lanes(first, backward, ended) > 0) {
                moved = true;
            }
        }
        if (!moved) {
            return false;
        }
    }
    return true;
}

} // namespace host

inline void __syncthreads() {
    host::wait(host::block, blockDim.x);
}

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    const unsigned char (*words)[32] = host::tell(value);
    return host::told<T>(words, threadIdx.x % host::WARP_LANES ^ mask);
}

typedef unsigned short host_bf16;

// Adds the product of two pairs.
inline void host_add(float &sum, unsigned left, unsigned right) {
    sum += __uint_as_float(left << 16) * __uint_as_float(right << 16);
    sum += __uint_as_float(left & 0xffff0000u) * __uint_as_float(right & 0xffff0000u);
}

// As the manual of PTX has the fragments of mma.m16n8k16: pairs along k, four to each lane that has a row of a or a
// column of b.
inline void multiply(float sum[4], const unsigned a[4], const unsigned b[2]) {
    struct Fragments {
        unsigned a[4], b[2];
    } own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const unsigned char (*words)[32] = host::tell(own);
    int lane = threadIdx.x % host::WARP_LANES, row = lane / 4 * 4, column = lane % 4 * 8;
    for (int pair = 0; pair < 8; pair++) {
        Fragments left = host::told<Fragments>(words, row + pair % 4);
        for (int i = 0; i < 4; i++) {
            unsigned right = host::told<Fragments>(words, column + i % 2 * 4 + pair % 4).b[pair / 4];
            host_add(sum[i], left.a[pair / 4 * 2 + i / 2], right);
        }
    }
}

inline void load_matrices(unsigned to[4], const host_bf16 *row) {
    const unsigned char (*words)[32] = host::tell(row);
    int lane = threadIdx.x % host::WARP_LANES;
    for (int matrix = 0; matrix < 4; matrix++) {
        const host_bf16 *from = host::told<const host_bf16 *>(words, matrix * 8 + lane / 4) + lane % 4 * 2;
        to[matrix] = from[0] | (unsigned)from[1] << 16;
    }
}

inline void load_transposed(unsigned to[4], const host_bf16 *row) {
    const unsigned char (*words)[32] = host::tell(row);
    int lane = threadIdx.x % host::WARP_LANES;
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned pair[2];
        for (int i = 0; i < 2; i++) {
            pair[i] = host::told<const host_bf16 *>(words, matrix * 8 + lane % 4 * 2 + i)[lane / 4];
        }
        to[matrix] = pair[0] | pair[1] << 16;
    }
}

inline void copy_16(void *to, const void *from, bool there) {
    host::Thread &own = host::current();
    host::Copy copy = {to, there ? from : nullptr, own.groups};
    host::copies_late ? own.copies.push_back(copy) : copy.make();
}

inline void copies_begun() {
    host::current().groups++;
}

template <int under_way> void wait_for_copies() {
    host::Thread &own = host::current();
    auto done = [&](const host::Copy &copy) {
        if (copy.group + under_way >= own.groups) {
            return false;
        }
        copy.make();
        return true;
    };
    own.copies.erase(std::remove_if(own.copies.begin(), own.copies.end(), done), own.copies.end());
}

// Calls `body(closure)` for every thread of a grid: 0 if all came to their end.
extern "C" int launch(const unsigned grid[3], unsigned block_threads, size_t shared_bytes, int backward,
                      void (*body)(void *), void *closure) {
    host::threads.resize(block_threads);
    for (host::Thread &thread : host::threads) {
        thread.stack.resize(host::STACK);
    }
    host::warps.resize(block_threads / host::WARP_LANES);
    host::exchanges.resize(block_threads / host::WARP_LANES);
    host::copies_late = !backward;
    host::body = body;
    host::closure = closure;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block_threads, 1, 1};
    for (unsigned index = 0; index < grid[0] * grid[1] * grid[2]; index++) {
        blockIdx = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
        if (!host::run_block(shared_bytes, backward != 0)) {
            return 1;
        }
    }
    return 0;
}
