// matmul.wgsl in CUDA C++, for NVRTC: the same packing, the same 32 features by 8 slices of K. In front of this stands
// ROWS. Needs __dp4a: compute capability 6.1.

struct Row {
    float scale;
    int sum;
};

static const unsigned FEATURES = 32, SLICES = 8;

__device__ static int dots(uint4 w, int shift, uint4 q, int sum) {
    const unsigned codes = 0x03030303u;
    sum = __dp4a((int)(w.x >> shift & codes), (int)q.x, sum);
    sum = __dp4a((int)(w.y >> shift & codes), (int)q.y, sum);
    sum = __dp4a((int)(w.z >> shift & codes), (int)q.z, sum);
    return __dp4a((int)(w.w >> shift & codes), (int)q.w, sum);
}

extern "C" __global__ void matmul(const uint4 *__restrict__ weights, const float *__restrict__ scale,
                                  const uint4 *__restrict__ x, const Row *__restrict__ rows,
                                  const unsigned *__restrict__ params, float *__restrict__ y) {
    __shared__ int sums[ROWS][SLICES][FEATURES];
    const unsigned m = params[0], n = params[1], halves = (params[2] + 127) / 128 * 2, stride = params[3] / 4;
    const unsigned first = blockIdx.y * ROWS;

    int sum[ROWS] = {};
    for (unsigned half = threadIdx.y; half < halves; half += SLICES) {
        const uint4 w = weights[((size_t)blockIdx.x * halves + half) * FEATURES + threadIdx.x];
        const unsigned from = half / 2 * 8 + half % 2;
#pragma unroll
        for (unsigned r = 0; r < ROWS; r++) {
            const uint4 *q = x + (size_t)min(first + r, m - 1) * stride + from;
            sum[r] = dots(w, 6, q[0], sum[r]);
            sum[r] = dots(w, 4, q[2], sum[r]);
            sum[r] = dots(w, 2, q[4], sum[r]);
            sum[r] = dots(w, 0, q[6], sum[r]);
        }
    }
#pragma unroll
    for (unsigned r = 0; r < ROWS; r++) sums[r][threadIdx.y][threadIdx.x] = sum[r];
    __syncthreads();

    const unsigned feature = blockIdx.x * FEATURES + threadIdx.x;
    for (unsigned r = threadIdx.y; r < ROWS; r += SLICES) {
        const unsigned row = first + r;
        if (row < m && feature < n) {
            int total = -rows[row].sum;
            for (unsigned slice = 0; slice < SLICES; slice++) total += sums[r][slice][threadIdx.x];
            y[(size_t)row * params[4] + params[5] + feature] = (float)total * (scale[0] * rows[row].scale);
        }
    }
}
