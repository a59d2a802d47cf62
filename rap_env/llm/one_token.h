/* What one token reads of keys and values, but for the scores, which are products: weights and their sums of values. */

/* e to the power of numbers up to 0: a power of 2, and for what is left the polynomial of Cephes. */
INLINE Floats exponentials(Floats powers)
{
    const Integers tiny = powers < -87;
    powers = (Floats)(((Integers)powers & ~tiny) | ((Integers)((Floats){0} - 87) & tiny));
    Floats whole = powers * 1.44269504f + 0x1.8p23f - 0x1.8p23f; /* rounded */
    Floats x = powers - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats value = ((((1.9875691500e-4f * x + 1.3981999507e-3f) * x + 8.3334519073e-3f) * x + 4.1665795894e-2f) * x +
                    1.6666665459e-1f) * x + 5.0000001201e-1f;
    return (value * x * x + x + 1) * (Floats)((__builtin_convertvector(whole, Integers) + 127) << 23);
}

/* outputs[r] = the sum over j of weights[r][j] * values[j], of up to `MOST_ROWS` rows: sums stay in registers. */
INLINE void weigh(const Matrix *values, const int element, const float *weights, float *outputs, const int rows,
                  ptrdiff_t n, ptrdiff_t k)
{
    ptrdiff_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        Floats sums[MOST_ROWS][PARTS] = {0};
        for (ptrdiff_t j = 0; j < k; j++) {
            const char *row = values->rows + j * values->stride;
            const float scale = scale_of(values, j, element);
            prefetch(row, i, element, FAR_AHEAD);
            for (int part = 0; part < PARTS; part++) {
                Floats own = scale * wide(row, i + part * WIDTH, element);
                for (int r = 0; r < rows; r++)
                    sums[r][part] += own * weights[r * k + j];
            }
        }
        for (int r = 0; r < rows; r++)
            memcpy(outputs + r * n + i, sums[r], sizeof sums[r]);
    }
    for (; i < n; i++)
        for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (ptrdiff_t j = 0; j < k; j++)
                sum += weights[r * k + j] * scale_of(values, j, element) *
                       wide_at(values->rows + j * values->stride, i, element);
            outputs[r * n + i] = sum;
        }
}

static void weighted(const Matrix *matrix, const float *inputs, float *sums, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t k)
{
#define OF_BFLOAT16(few) weigh(matrix, BFLOAT16, inputs + row * k, sums + row * n, few, n, k)
#define OF_INT8(few) weigh(matrix, INT8, inputs + row * k, sums + row * n, few, n, k)
    if (matrix->scales == NULL)
        FOR_ROWS(OF_BFLOAT16)
    else
        FOR_ROWS(OF_INT8)
}

static void softmax(float *row, ptrdiff_t n, float scale)
{
    float largest = row[0], sum = 0;
    for (ptrdiff_t i = 1; i < n; i++)
        largest = row[i] > largest ? row[i] : largest;
    for (ptrdiff_t i = 0; i < n; i += WIDTH) {
        size_t bytes = sizeof(float) * (n - i < WIDTH ? n - i : WIDTH);
        Floats numbers = (Floats){0} - INFINITY; /* whose exponentials are as good as 0 */
        memcpy(&numbers, row + i, bytes);
        numbers = exponentials(scale * (numbers - largest));
        sum += total(numbers);
        memcpy(row + i, &numbers, bytes);
    }
    for (ptrdiff_t i = 0; i < n; i++)
        row[i] /= sum;
}
