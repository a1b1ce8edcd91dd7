// A GPU of one block at a time, on threads of the processor: as much of CUDA as the kernels' texts use. A text is
// included in a namespace behind this, and launched by `launch`. Blocks find in shared memory what the one before left.
#include <algorithm>
#include <barrier>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)

struct Three {
    unsigned x, y, z;
};
static thread_local Three threadIdx;
static Three blockIdx, blockDim, gridDim;

static std::unique_ptr<std::barrier<>> block;
static std::vector<std::unique_ptr<std::barrier<>>> warps;

static unsigned own_thread() { return threadIdx.y * blockDim.x + threadIdx.x; }
static void __syncthreads() { block->arrive_and_wait(); }
static unsigned __activemask() { return ~0u; }

static int __shfl_xor_sync(unsigned, int value, unsigned mask) {
    static int exchanged[1024];
    auto &warp = *warps[own_thread() / 32];
    exchanged[own_thread()] = value;
    warp.arrive_and_wait();
    int other = exchanged[own_thread() ^ mask];
    warp.arrive_and_wait();
    return other;
}

static int __dp4a(int a, int b, int sum) {
    for (int shift = 0; shift < 32; shift += 8) {
        sum += int(static_cast<signed char>(a >> shift)) * static_cast<signed char>(b >> shift);
    }
    return sum;
}

template <typename T> static T min(T a, T b) { return std::min(a, b); }

// Of two bytes, and for whole numbers only: int8, and weights.
struct __half {
    short value;
    __half() = default;
    explicit __half(int value) : value(short(value)) {}
    operator float() const { return value; }
};

// Matrix units. Every thread of a warp has all of a matrix and does all of the work.
namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void> struct fragment {
    T values[16][16];
};

template <typename T>
using A = fragment<matrix_a, 16, 16, 16, T, row_major>;
template <typename T>
using B = fragment<matrix_b, 16, 16, 16, T, col_major>;
template <typename T>
using Sum = fragment<accumulator, 16, 16, 16, T>;

// What CUDA asks of a pointer, and of the distance of rows.
template <typename T> static void check(const T *from, unsigned stride) {
    if (reinterpret_cast<std::uintptr_t>(from) % 32 || stride * sizeof(T) % 16) {
        std::abort();
    }
}
template <typename T> static void load_matrix_sync(A<T> &to, const T *from, unsigned stride) {
    check(from, stride);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) to.values[i][k] = from[i * stride + k];
}
template <typename T> static void load_matrix_sync(B<T> &to, const T *from, unsigned stride) {
    check(from, stride);
    for (int k = 0; k < 16; k++)
        for (int j = 0; j < 16; j++) to.values[k][j] = from[j * stride + k];
}
template <typename T> static void fill_fragment(Sum<T> &to, T value) {
    for (auto &row : to.values) std::fill(row, row + 16, value);
}
template <typename T, typename S>
static void mma_sync(Sum<S> &d, const A<T> &a, const B<T> &b, const Sum<S> &c) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            S sum = c.values[i][j];
            for (int k = 0; k < 16; k++) sum += S(a.values[i][k]) * S(b.values[k][j]);
            d.values[i][j] = sum;
        }
}
template <typename T> static void store_matrix_sync(T *to, const Sum<T> &from, unsigned stride, layout_t) {
    check(to, stride);
    // One thread is enough, and the others' writes would race.
    if (own_thread() % 32 == 0) {
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) to[i * stride + j] = from.values[i][j];
    }
}
}  // namespace nvcuda::wmma

// Launches a kernel of six buffers.
template <typename Kernel> static void launch(Kernel kernel, const unsigned (&grid)[3], const unsigned (&threads)[3]) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads[0], threads[1], threads[2]};
    unsigned count = threads[0] * threads[1] * threads[2];
    block = std::make_unique<std::barrier<>>(count);
    warps.clear();
    for (unsigned i = 0; i < count; i += 32) {
        warps.push_back(std::make_unique<std::barrier<>>(std::min(32u, count - i)));
    }
    std::vector<std::thread> all;
    for (unsigned thread = 0; thread < count; thread++) {
        all.emplace_back([=] {
            threadIdx = {thread % threads[0], thread / threads[0] % threads[1], thread / threads[0] / threads[1]};
            for (unsigned y = 0; y < grid[1]; y++)
                for (unsigned x = 0; x < grid[0]; x++) {
                    __syncthreads();
                    if (thread == 0) blockIdx = {x, y, 0};
                    __syncthreads();
                    kernel();
                }
        });
    }
    for (auto &thread : all) thread.join();
}
