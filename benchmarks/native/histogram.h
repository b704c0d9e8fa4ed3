/* A latency histogram, log-linear: each power of two is cut into 64 equal buckets, so a value is known to 1.6 % in
 * constant memory. */
#ifndef HISTOGRAM_H
#define HISTOGRAM_H

#include <stdint.h>

#define SUB_BITS 6
#define SUB (1u << SUB_BITS)
static uint64_t histogram[(64 - SUB_BITS + 1) * SUB];

static unsigned bucket_of(uint64_t value)
{
    if (value < SUB)
        return (unsigned)value;
    unsigned shift = 63u - (unsigned)__builtin_clzll(value) - SUB_BITS;
    return (shift + 1) * SUB + (unsigned)((value >> shift) - SUB);
}

static uint64_t bucket_middle(unsigned bucket)
{
    if (bucket < SUB)
        return bucket;
    unsigned shift = bucket / SUB - 1;
    return ((uint64_t)(bucket % SUB + SUB) << shift) + ((1ull << shift) >> 1);
}

/* The value, in thousandths of the unit that went in, below which this share of `total` values lies. */
static double percentile_us(uint64_t total, double share)
{
    uint64_t rank = (uint64_t)((double)total * share), seen = 0;
    for (unsigned bucket = 0; bucket < sizeof histogram / sizeof histogram[0]; bucket++) {
        seen += histogram[bucket];
        if (seen > rank)
            return (double)bucket_middle(bucket) / 1e3;
    }
    return 0.0;
}

#endif
