/* Products of one row by the instruction for pairs, at the rate of memory: a processor reads several streams faster than
   one, if they lie far apart. So the rows or columns of a matrix are read as four runs side by side. */

#ifdef PAIRS

enum { RUNS = 4, RUN_AHEAD = 1024 }; /* bytes to a prefetch, in each run */

INLINE void ask_ahead(const char *line)
{
    __builtin_prefetch(line + RUN_AHEAD, 0, 2);
}

/* A number for each row, SIDE of each run from place i on. */
PAIRS_INLINE __m512 of_runs(const uint16_t *numbers, ptrdiff_t run, ptrdiff_t i)
{
    uint16_t halves[RUNS * SIDE];
    for (int r = 0; r < RUNS; r++)
        memcpy(halves + r * SIDE, numbers + r * run + i, SIDE * sizeof *halves);
    return widened_at(halves, 0xffff);
}

/* outputs[i] = inputs . matrix[i] + bias[i], of so many rows of each run. */
PAIRS_INLINE void one_with(const Matrix *matrix, const int element, const uint16_t *bias, const uint16_t *inputs,
                           uint16_t *outputs, ptrdiff_t run, ptrdiff_t k)
{
    for (ptrdiff_t i = 0; i < run; i += SIDE) {
        __m512 sums[RUNS][SIDE];
        for (int side = 0; side < SIDE; side++) {
            const char *rows[RUNS];
            __m512 own[RUNS] = {0};
            for (int r = 0; r < RUNS; r++)
                rows[r] = matrix->rows + (r * run + i + side) * matrix->stride;
            for (ptrdiff_t j = 0; j < k; j += LANES) {
                const __m512bh input = numbers_at(inputs + j, first(k - j));
                for (int r = 0; r < RUNS; r++) {
                    ask_ahead(rows[r] + j * element);
                    own[r] = _mm512_dpbf16_ps(own[r], input, brought_at(rows[r] + j * element, first(k - j), element));
                }
            }
            for (int r = 0; r < RUNS; r++)
                sums[r][side] = own[r];
        }
        __m512 all = totals(sums);
        if (element == INT8)
            all *= of_runs((const uint16_t *)matrix->scales, run, i);
        if (bias != NULL)
            all += of_runs(bias, run, i);
        uint16_t halves[RUNS * SIDE];
        _mm256_storeu_si256((__m256i *)halves, (__m256i)_mm512_cvtneps_pbh(all));
        for (int r = 0; r < RUNS; r++)
            memcpy(outputs + r * run + i, halves + r * SIDE, SIDE * sizeof *halves);
    }
}

/* That of all n rows. Room as for `pairs_by_rows`. */
PAIRS static void one_by_rows(const Matrix *matrix, const uint16_t *bias, const uint16_t *inputs, uint16_t *outputs,
                              void *room, ptrdiff_t n, ptrdiff_t k)
{
    const ptrdiff_t run = n / (RUNS * SIDE) * SIDE, done = RUNS * run;
    Matrix rest = *matrix;
    rest.rows += done * rest.stride;
    if (matrix->scales == NULL)
        one_with(matrix, BFLOAT16, bias, inputs, outputs, run, k);
    else {
        one_with(matrix, INT8, bias, inputs, outputs, run, k);
        rest.scales += done * rest.scale_stride;
    }
    pairs_by_rows(&rest, bias == NULL ? NULL : bias + done, inputs, outputs + done, room, 1, n - done, k);
}

/* outputs[i] = sum over j of inputs[j] * matrix[j], plus bias, of a matrix of k rows with n elements. Room for n sums. */
PAIRS static void one_by_columns(const Matrix *matrix, const uint16_t *bias, const uint16_t *inputs, uint16_t *outputs,
                                 void *room, ptrdiff_t n, ptrdiff_t k)
{
    const ptrdiff_t run = k / RUNS, done = RUNS * run;
    float *sums = room;
    memset(sums, 0, (n + LANES) * sizeof *sums);
    for (ptrdiff_t j = 0; j < run; j++) {
        const char *rows[RUNS];
        __m512bh pairs[RUNS / 2];
        for (int r = 0; r < RUNS; r++)
            rows[r] = matrix->rows + (r * run + j) * matrix->stride;
        for (int pair = 0; pair < RUNS / 2; pair++) {
            const uint16_t *even = inputs + 2 * pair * run + j;
            pairs[pair] = (__m512bh)_mm512_set1_epi32((int32_t)(even[0] | (uint32_t)even[run] << 16));
        }
        for (ptrdiff_t i = 0; i < n; i += LANES) {
            const __mmask32 mask = first(n - i);
            __m512 front = _mm512_loadu_ps(sums + i), back = _mm512_loadu_ps(sums + i + WIDTH);
            for (int pair = 0; pair < RUNS / 2; pair++) {
                const char *even = rows[2 * pair] + i * BFLOAT16, *odd = rows[2 * pair + 1] + i * BFLOAT16;
                ask_ahead(even);
                ask_ahead(odd);
                __m512i left = (__m512i)numbers_at(even, mask), right = (__m512i)numbers_at(odd, mask);
                front = _mm512_dpbf16_ps(front, pairs[pair], (__m512bh)_mm512_unpacklo_epi16(left, right));
                back = _mm512_dpbf16_ps(back, pairs[pair], (__m512bh)_mm512_unpackhi_epi16(left, right));
            }
            _mm512_storeu_ps(sums + i, front);
            _mm512_storeu_ps(sums + i + WIDTH, back);
        }
    }
    if (done < k) {
        uint16_t rest[GROUP] = {0};
        memcpy(rest, inputs + done, (k - done) * sizeof *rest);
        Lines none = lines_of(NULL, 0, 0, 0);
        add_group(matrix->rows + done * matrix->stride, matrix->stride, k - done, rest, GROUP, sums, 1, n, &none);
    }
    finish(sums, bias, outputs, n);
}

INLINE size_t one_room(ptrdiff_t n, ptrdiff_t k)
{
    const size_t sums = (n + LANES) * sizeof(float), rows = pairs_room(1, k);
    return sums > rows ? sums : rows;
}

#endif
