// main INPUT OUTPUT: grid and threads, then six buffers of words with their counts; the last one is written back.
#include <cstdio>
#include <cstdlib>
#include "device.hpp"

namespace text {
#include "kernel.cu"
}

// A buffer of whatever a kernel takes.
struct Any {
    void *pointer;
    template <typename T> operator T *() const { return static_cast<T *>(pointer); }
};

static void read(FILE *file, void *to, size_t words) {
    if (std::fread(to, 4, words, file) != words) std::exit(2);
}

int main(int, char **arguments) {
    FILE *input = std::fopen(arguments[1], "rb");
    if (!input) return 2;
    unsigned grid[3], threads[3];
    read(input, grid, 3);
    read(input, threads, 3);
    unsigned *buffers[6], counts[6];
    for (int i = 0; i < 6; i++) {
        read(input, &counts[i], 1);
        buffers[i] = static_cast<unsigned *>(std::aligned_alloc(64, (counts[i] * 4 + 63) / 64 * 64));
        read(input, buffers[i], counts[i]);
    }
    Any any[6];
    for (int i = 0; i < 6; i++) any[i].pointer = buffers[i];
    launch([&] { text::ENTRY(any[0], any[1], any[2], any[3], any[4], any[5]); }, grid, threads);
    FILE *output = std::fopen(arguments[2], "wb");
    if (!output || std::fwrite(buffers[5], 4, counts[5], output) != counts[5]) return 2;
    return std::fclose(output);
}
