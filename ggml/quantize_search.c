/* Scales by search: the d and m with which a block, every code being the nearest, comes closest to
 * its weights, where an error counts as much as its column matters.
 *
 * Only scales are searched, as the file will hold them: given these, the nearest codes are best.
 * From each of a few dozen starts, which leave more and more of the largest weights out, least
 * squares lead to the bottom of a valley. The first start is the rule of the format (quantize.c),
 * so none leads to more error than that, and it stands where it is exact or sums are not finite.
 * At the end a block is stretched to the length of its weights again.
 *
 * Some blocks are searched side by side, one in each lane. No sum crosses lanes, so compilers make
 * vectors of the loops over lanes, and the bytes are the same whatever they make. */
#include <math.h>

#include "blocks.h"
#include "fp16.h"

enum { LANES = 16 };

static const double LARGEST_LACK = 1 / 16.0; /* of a block, that is made good */

typedef float lanes[LANES];

struct search {
    const struct ggml_layout * layout;
    float low, high; /* codes, less the one that means 0 */
    lanes x[GGML_ROW_UNIT];
    lanes w[GGML_ROW_UNIT]; /* what an error counts for */
    lanes sum;              /* of w, without the outlier's */
    lanes base;             /* the error of the outlier */
    int outlier[LANES];     /* its place, or layout->size */
    lanes outlier_w;        /* what its w was: it is 0 now */
    struct {
        lanes d, m, error;
        int outlier[LANES];
    } best;
};

static float stored(const struct search * s, float scale) {
    return s->layout->wide ? scale : fp16_to_fp32(fp32_to_fp16(scale));
}

/* The nearest code, less zero; adding 1.5 * 2^23 leaves no room for a fraction. */
static float nearest(float steps, float low, float high) {
    float bounded = steps > low ? steps : low;
    bounded = bounded < high ? bounded : high;
    return (bounded + 12582912.0f) - 12582912.0f;
}

/* Sums over a block, of w times … */
struct sums {
    lanes rr, r, rq, q, qq; /* r: what is left of x */
};

/* What the nearest codes leave. In its own function, compilers know the pointers to be apart. */
static void add_up(const struct search * restrict s, const float * restrict d,
                   const float * restrict m, const float * restrict id,
                   struct sums * restrict sums) {
    const float low = s->low, high = s->high;
    for (int k = 0; k < s->layout->size; k++) {
        for (int l = 0; l < LANES; l++) {
            float x = s->x[k][l], w = s->w[k][l];
            float q = nearest((x - m[l]) * id[l], low, high);
            float r = x - (q * d[l] + m[l]);
            float wr = w * r, wq = w * q;
            sums->rr[l] += wr * r;
            sums->r[l] += wr;
            sums->rq[l] += wr * q;
            sums->q[l] += wq;
            sums->qq[l] += wq * q;
        }
    }
}

/* Keeps d and m where they are the best so far, and moves them to what fits their codes best. */
static void attempt(struct search * s, lanes d, lanes m) {
    lanes id;
    struct sums sums = {0};
    for (int l = 0; l < LANES; l++) {
        d[l] = stored(s, d[l]);
        m[l] = stored(s, m[l]);
        id[l] = d[l] != 0 ? 1 / d[l] : 0;
        sums.rr[l] = s->base[l];
    }
    add_up(s, d, m, id, &sums);
    const float *error = sums.rr, *r1 = sums.r, *rq = sums.rq, *q1 = sums.q, *qq = sums.qq;
    for (int l = 0; l < LANES; l++) {
        if (error[l] < s->best.error[l]) {
            s->best.error[l] = error[l];
            s->best.d[l] = d[l];
            s->best.m[l] = m[l];
            s->best.outlier[l] = s->outlier[l];
        }
        float det = s->sum[l] * qq[l] - q1[l] * q1[l];
        if (!s->layout->min) {
            d[l] += qq[l] > 0 ? rq[l] / qq[l] : 0;
        } else if (det > 1e-6f * s->sum[l] * qq[l]) {
            d[l] += (s->sum[l] * rq[l] - q1[l] * r1[l]) / det;
            m[l] += (qq[l] * r1[l] - q1[l] * rq[l]) / det;
        } else { /* all codes are the same */
            m[l] += r1[l] / s->sum[l];
        }
    }
}

/* A start, and where that leads. */
static void start(struct search * s, lanes d, lanes m) {
    attempt(s, d, m);
    attempt(s, d, m);
}

/* Formats without a minimum: the largest weight gets a code that is near the outermost, on either
 * side of it, or far outside, so that it is cut off. */
static void search_scale(struct search * s) {
    lanes top = {0};
    for (int k = 0; k < s->layout->size; k++)
        for (int l = 0; l < LANES; l++) top[l] = fmaxf(top[l], fabsf(s->x[k][l]));
    const bool symmetric = s->low == -s->high;
    for (int side = symmetric ? 1 : -1; side <= 1; side += 2) {
        const float limit = side < 0 ? -s->low : s->high;
        for (int i = 0; i < 14; i++) {
            const float step = (float)i;
            const float code = i < 9 ? limit + 0.8f - 0.35f * step : limit * (step - 4) * 0.25f;
            lanes d, m = {0};
            for (int l = 0; l < LANES; l++) d[l] = (float)side * top[l] / code;
            start(s, d, m);
        }
    }
}

/* Formats with one: all of the range or less of it, at its bottom, middle and top. */
static void search_range(struct search * s) {
    lanes min, max;
    for (int l = 0; l < LANES; l++) {
        min[l] = INFINITY;
        max[l] = -INFINITY;
    }
    for (int k = 0; k < s->layout->size; k++) {
        for (int l = 0; l < LANES; l++) {
            if (k == s->outlier[l]) continue;
            min[l] = s->x[k][l] < min[l] ? s->x[k][l] : min[l]; /* fminf may take either zero */
            max[l] = s->x[k][l] > max[l] ? s->x[k][l] : max[l];
        }
    }
    const int n = s->layout->outlier ? 7 : 12; /* which is searched twice */
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < 3; j++) {
            lanes d, m;
            for (int l = 0; l < LANES; l++) {
                float range = max[l] - min[l], part = 1.04f - 0.6f * (float)i / (float)n;
                d[l] = part * range / s->high;
                m[l] = min[l] + (1 - part) * (0.5f * (float)j) * range;
            }
            start(s, d, m);
        }
    }
}

/* Puts weight k of a block apart (layout->size: none), in place of the one that was. */
static void set_outlier(struct search * s, int l, int k) {
    const int size = s->layout->size, before = s->outlier[l];
    if (before < size) s->w[before][l] = s->outlier_w[l];
    s->outlier[l] = k;
    s->base[l] = 0;
    if (k < size) {
        float r = s->x[k][l] - fp16_to_fp32(fp32_to_fp16(s->x[k][l]));
        s->outlier_w[l] = s->w[k][l];
        s->base[l] = s->w[k][l] * r * r;
        s->w[k][l] = 0;
    }
    s->sum[l] = 0;
    for (int i = 0; i < size; i++) s->sum[l] += s->w[i][l];
}

/* Q4_1_O: on either side of the mean, the weight whose distance from it counts most. */
static void search_outlier(struct search * s) {
    for (int side = -1; side <= 1; side += 2) {
        for (int l = 0; l < LANES; l++) {
            set_outlier(s, l, s->layout->size);
            float mean = 0, top = -1;
            int place = 0;
            for (int k = 0; k < s->layout->size; k++) mean += s->w[k][l] * s->x[k][l];
            for (int k = 0; k < s->layout->size; k++) {
                float r = (float)side * (s->x[k][l] - mean), count = s->w[k][l] * r * r;
                if (r >= 0 && count > top) {
                    top = count;
                    place = k;
                }
            }
            set_outlier(s, l, place);
        }
        search_range(s);
    }
}

/* Follows the best to the bottom of its valley. */
static void polish(struct search * s) {
    lanes d, m;
    for (int l = 0; l < LANES; l++) {
        set_outlier(s, l, s->best.outlier[l]);
        d[l] = s->best.d[l];
        m[l] = s->best.m[l];
    }
    for (int i = 0; i < 4; i++) attempt(s, d, m);
}

/* Least squares make a block smaller than its weights are, by the part e of its squares that they
 * miss: that is orthogonal to what they find. In a sum of many products such a lack adds up where
 * other errors cancel out, so it is made good, and the part that is missed becomes e / (1 - e):
 * but not where that is a lot, nor where d and m have too few digits for it. */
static void stretch(const struct search * s, int l, const float * q, float * d, float * m) {
    double xx = 0, xy = 0, error = s->base[l];
    for (int k = 0; k < s->layout->size; k++) {
        const double wx = (double)s->w[k][l] * s->x[k][l];
        xx += wx * s->x[k][l];
        xy += wx * ((double)q[k] * *d + *m);
    }
    const double missed = s->best.error[l] / xx;
    if (!(missed < LARGEST_LACK && xy > 0)) return;
    const float longer_d = stored(s, (float)(xx / xy * *d));
    const float longer_m = stored(s, (float)(xx / xy * *m));
    for (int k = 0; k < s->layout->size; k++) {
        const double r = s->x[k][l] - ((double)q[k] * longer_d + longer_m);
        error += s->w[k][l] * r * r;
    }
    if (!(error <= 1.01 * s->best.error[l] / (1 - missed))) return;
    *d = longer_d;
    *m = longer_m;
}

/* Weights and what they count for: those of a block add up to 1. */
static void load(struct search * s, int l, const float * x, const float * importances) {
    const int size = s->layout->size;
    double sum = 0;
    for (int k = 0; k < size && importances != NULL; k++) sum += importances[k];
    s->outlier[l] = size;
    for (int k = 0; k < size; k++) {
        s->x[k][l] = x[k];
        s->w[k][l] = sum > 0 ? (float)(importances[k] / sum) : 1.0f / (float)size;
    }
}

void ggml_search_row(enum ggml_type type, const float * x, const float * importances, void * row,
                     size_t n) {
    const struct ggml_layout * layout = &ggml_layouts[type];
    uint8_t * bytes = row;
    if (layout->size == 0) {
        ggml_quantize_row(type, x, row, n);
        return;
    }
    const size_t size = layout->size, n_blocks = n / size;
    const size_t block_bytes = ggml_type_traits(type)->block_bytes;
    const float levels = (float)((1 << layout->bits) - 1);
    struct search s = {.layout = layout, .low = -(float)layout->zero};
    s.high = levels + s.low;
    if (layout->bits == 8) {
        s.low = -127;
        s.high = 127;
    }
    ggml_quantize_row(type, x, row, n);
    for (size_t first = 0; first < n_blocks; first += LANES) {
        struct ggml_block rule[LANES];
        bool stands[LANES];
        lanes d, m;
        for (int l = 0; l < LANES; l++) {
            const size_t i = first + (size_t)l < n_blocks ? first + (size_t)l : n_blocks - 1;
            load(&s, l, x + i * size, importances == NULL ? NULL : importances + i * size);
            ggml_block_unpack(type, bytes + i * block_bytes, &rule[l]);
            set_outlier(&s, l, rule[l].index < size ? rule[l].index : (int)size);
            d[l] = rule[l].d;
            m[l] = layout->min ? rule[l].m : 0;
            s.best.error[l] = INFINITY;
        }
        attempt(&s, d, m);
        for (int l = 0; l < LANES; l++)
            stands[l] = !(s.best.error[l] > 0 && s.best.error[l] < INFINITY);
        if (layout->outlier) {
            search_outlier(&s);
        } else if (layout->min) {
            search_range(&s);
        } else {
            search_scale(&s);
        }
        polish(&s);
        for (int l = 0; l < LANES && first + (size_t)l < n_blocks; l++) {
            if (stands[l]) continue;
            struct ggml_block * block = &rule[l];
            float q[GGML_ROW_UNIT], id = s.best.d[l] != 0 ? 1 / s.best.d[l] : 0;
            for (size_t k = 0; k < size; k++) {
                q[k] = nearest((s.x[k][l] - s.best.m[l]) * id, s.low, s.high);
                block->q[k] = (uint8_t)((int)q[k] + layout->zero);
            }
            block->d = s.best.d[l];
            block->m = s.best.m[l];
            stretch(&s, l, q, &block->d, &block->m);
            if (layout->outlier) {
                const int k = s.best.outlier[l];
                block->index = (uint16_t)k;
                block->outlier = s.x[k][l];
                block->q[k] = 0;
            }
            ggml_block_pack(type, block, bytes + (first + (size_t)l) * block_bytes);
        }
    }
}
