/* A quantizer's two directions, each in one pass over memory; fake_quant.py holds their definitions. And what quantizing
 * shifts behind a clip; methods/bias_correction.py defines that.
 *
 * Every operation is one of IEEE 754 in float32, rounded as PyTorch rounds it; -ffp-contract=off keeps it so. Values
 * are float32, or bfloat16 (`half`), whose results are rounded after each operation. Arguments that are constant where
 * a loop is called make a loop of their own, which compilers turn into vector instructions.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define PIECE 16384 /* values of one scale that one thread works on at a time */
#define FEW 32768   /* up to so many values, one thread does all */

typedef int64_t Count;

INLINE float clip(float x, float low, float high) { /* NaN and -0 stay */
    float least = x < low ? low : x;
    return least > high ? high : least;
}

/* x as a bfloat16; ties go to even, NaN stays. Written without a branch, or loops would not become vector ones. */
INLINE uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) | (x != x) * 0x7fc0;
}

INLINE float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float rounded(float x, int half) { return half ? widen(narrow(x)) : x; }

INLINE float get(const void *from, Count i, int half) {
    return half ? widen(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

INLINE void put(void *to, Count i, float x, int half) {
    if (half)
        ((uint16_t *)to)[i] = narrow(x);
    else
        ((float *)to)[i] = x;
}

INLINE const void *at(const void *values, Count i, int half) { return (const char *)values + i * (half ? 2 : 4); }

/* x, out: n values; they may be the same. scale, and lows and highs if there are: one, or `each` of n. inside: n, written
 * where `marks`. */
INLINE void quantize_values(const void *x, void *out, uint8_t *inside, Count n, const float *scale, const float *lows,
                            const float *highs, float low, float high, float top, int each, int clips, int divides,
                            int marks, int half) {
#pragma omp simd
    for (Count i = 0; i < n; i++) {
        float step = scale[each ? i : 0], inverse = 1 / step, value = get(x, i, half);
        float least = lows ? lows[each ? i : 0] : low, most = highs ? highs[each ? i : 0] : high;
        value = clips ? clip(value, 0, top) : value;
        float code = rintf(rounded(divides ? value / step : value * inverse, half));
        if (marks)
            inside[i] = (code >= least) & (code <= most);
        put(out, i, clip(code, least, most) * step, half);
    }
}

/* The value at place p has the scale (p / inner) % channels, and such ends, or low and high where there are none. kind: 1
 * clips, 2 divides, 4 marks, 8 half. */
void quantize(const void *x, void *out, uint8_t *inside, Count count, const float *scale, const float *lows,
              const float *highs, float low, float high, float top, Count channels, Count inner, int kind,
              int threads) {
    int each = inner == 1 && channels > 1, half = kind & 8 ? 1 : 0;
    Count run = each ? channels : channels > 1 ? inner : PIECE;
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > FEW)
    for (Count r = 0; r < (count + run - 1) / run; r++) {
        Count place = r * run, n = count - place < run ? count - place : run, c = each ? 0 : r % channels;
        const void *from = at(x, place, half);
        void *to = (void *)at(out, place, half);
        uint8_t *mark = inside + (kind & 4 ? place : 0);
#define EITHER(EACH, KIND)                                                                                               \
    case EACH * 16 + KIND:                                                                                             \
        quantize_values(from, to, mark, n, scale + c, lows ? lows + c : 0, highs ? highs + c : 0, low, high, top, EACH, \
                        (KIND & 1) != 0, (KIND & 2) != 0, (KIND & 4) != 0, (KIND & 8) != 0);                           \
        break;
#define BOTH(KIND) EITHER(0, KIND) EITHER(1, KIND)
        switch (each * 16 + kind) { BOTH(0) BOTH(1) BOTH(2) BOTH(4) BOTH(6) BOTH(8) BOTH(9) }
    }
}

/* n values of one scale. passed: the gradient of x; terms: its share of that of the scale, times the scale. */
INLINE void differentiate_values(const void *grad, const void *x, void *passed, void *terms, Count n, float step,
                                 float low, float high, float least, float most, float top, int clips, int learns,
                                 int half) {
    float inverse = 1 / step;
#pragma omp simd
    for (Count i = 0; i < n; i++) {
        float coming = get(grad, i, half), given = get(x, i, half);
        float value = clips ? clip(given, 0, top) : given;
        float quotient = rounded(value * inverse, half);
        float quantized = rounded(clip(rintf(quotient), low, high) * step, half);
        int outside = (quotient <= least) | (quotient >= most);
        float kept = outside ? 0 : value;
        float going = outside ? 0 : coming;
        if (clips)
            going = (given <= 0) | (given >= top) ? 0 : going;
        put(passed, i, going, half);
        if (learns)
            put(terms, i, coming * rounded(quantized - kept, half), half);
    }
}

/* Row r of `rows`, of `values` each, has scale r. least, most: where saturation begins. kind: 1 clips, 2 learns, 8 half. */
void differentiate(const void *grad, const void *x, void *passed, void *terms, Count rows, Count values,
                   const float *scale, float low, float high, float least, float most, float top, int kind,
                   int threads) {
    Count run = rows > 1 ? values : PIECE, count = rows * values;
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > FEW)
    for (Count r = 0; r < (count + run - 1) / run; r++) {
        Count place = r * run, n = count - place < run ? count - place : run;
        float step = scale[rows > 1 ? r : 0];
#define CASE(KIND)                                                                                                     \
    case KIND:                                                                                                         \
        differentiate_values(at(grad, place, KIND & 8), at(x, place, KIND & 8), (void *)at(passed, place, KIND & 8),   \
                             (void *)at(terms, KIND & 2 ? place : 0, KIND & 8), n, step, low, high, least, most, top,  \
                             (KIND & 1) != 0, (KIND & 2) != 0, (KIND & 8) != 0);                                       \
        break;
        switch (kind) { CASE(0) CASE(1) CASE(2) CASE(3) CASE(8) CASE(9) CASE(10) CASE(11) }
    }
}

/* For each row of n values x and wanted the c, in `steps` of Newton's method, for which x - c and wanted have one mean when
 * they are clipped. least: the share of values that count as unclipped at least. */
void shifts(const float *x, const float *wanted, double *found, Count rows, Count n, float low, float high,
            double least, int steps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n > FEW)
    for (Count r = 0; r < rows; r++) {
        const float *y = x + r * n, *t = wanted + r * n;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Count i = 0; i < n; i++)
            sum += y[i] - t[i];
        double c = sum / n;
        for (int step = 0; step < steps; step++) {
            float now = (float)c;
            double outside = 0;
            sum = 0;
#pragma omp simd reduction(+ : sum, outside)
            for (Count i = 0; i < n; i++) {
                float moved = y[i] - now, kept = clip(moved, low, high);
                sum += kept - clip(t[i], low, high);
                outside += kept != moved;
            }
            double inside = 1 - outside / n;
            c += sum / n / (inside < least ? least : inside);
        }
        found[r] = c;
    }
}
