// The read ceiling of the CPU benchmark: every byte is loaded once and combined by XOR.
//
// torch.sum would be bound by its additions, a copy writes as well. XOR has no order to keep: vectors
// are combined in independent chains, so nothing but memory is waited for. How many places memory is
// read at once matters to the prefetchers of some processors, so it is an argument.

#include <stdint.h>

typedef uint64_t vector __attribute__((vector_size(64)));

enum { PREFETCH = 16, CHAINS = 8 };  // vectors ahead: 1 KiB; independent sums

static uint64_t read_part(const vector * start, int64_t vectors, int streams) {
    vector sums[CHAINS] = {{0}};
    const int64_t stride = vectors / streams;
    for (int64_t i = 0; i + CHAINS <= stride; i += CHAINS) {
        for (int stream = 0; stream < streams; ++stream) {
            const vector * here = start + stream * stride + i;
            for (int chain = 0; chain < CHAINS; ++chain) {
                __builtin_prefetch(here + chain + PREFETCH);
                sums[chain] ^= here[chain];
            }
        }
    }
    vector all = {0};
    for (int chain = 0; chain < CHAINS; ++chain) all ^= sums[chain];
    uint64_t result = 0;
    for (int lane = 0; lane < 8; ++lane) result ^= all[lane];
    return result;
}

// Returns the XOR of all whole blocks of `bytes` bytes at `start` (64-byte aligned), so that no
// compiler may leave the loads away.
uint64_t bench_read(const void * start, int64_t bytes, int streams, int threads) {
    const vector * vectors = start;
    const int64_t each = bytes / 64 / threads;
    uint64_t result = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(^ : result)
    for (int thread = 0; thread < threads; ++thread) {
        result ^= read_part(vectors + thread * each, each, streams);
    }
    return result;
}
