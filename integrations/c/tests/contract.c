/* What the header promises, seen from C: numbers against an oracle of its own, and mistakes made on purpose. Silent if all is
 * well. */
#include <batchnorm.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 5, C = 3, S = 7, LEN = N * C * S };

static int failures = 0;

static void check(bool holds, const char *what, int line) {
    if (!holds) {
        fprintf(stderr, "line %d: %s (last refusal: %s)\n", line, what, bn_last_error());
        failures++;
    }
}

#define CHECK(condition) check((condition), #condition, __LINE__)
#define OK(call) CHECK((call) == BN_STATUS_OK)
/* The call is refused with this code, and the last message has this in it. */
#define REFUSED(code, text, call) \
    do { \
        CHECK((call) == (code)); \
        CHECK(strstr(bn_last_error(), (text)) != NULL); \
    } while (0)

static bn_plan *plan_of(int32_t dtype) {
    const size_t spatial[] = {S};
    bn_plan *plan = NULL;
    OK(bn_plan_new(dtype, BN_LAYOUT_CHANNELS_FIRST, N, C, spatial, 1, 1e-3, &plan));
    return plan;
}

static bn_saved *saved_of(const bn_plan *plan) {
    bn_saved *saved = NULL;
    OK(bn_saved_new(plan, &saved));
    return saved;
}

static double value(int i) { return sin(1.0 + i * i) * 3.0 + i % 4; }

static bool close_to(double got, double expected) { return fabs(got - expected) <= 1e-12 * fmax(1.0, fabs(expected)); }

/* Forward, backward and running statistics in double, by the formulas, in two passes. */
static void numbers(void) {
    bn_plan *plan = plan_of(BN_DTYPE_F64);
    bn_saved *saved = saved_of(plan);
    const double gamma[C] = {1.5, -0.5, 2.0}, beta[C] = {0.25, 0.0, -1.0};
    double x[LEN], dy[LEN], y[LEN], dx[LEN], dgamma[C], dbeta[C], mean[C] = {0}, var[C] = {1, 1, 1}, inferred[LEN];
    for (int i = 0; i < LEN; i++) {
        x[i] = value(i);
        dy[i] = value(3 * i + 1);
    }
    OK(bn_forward_train(plan, x, LEN, gamma, C, beta, C, y, LEN, saved));
    OK(bn_backward(plan, x, LEN, dy, LEN, saved, gamma, C, beta, C, dx, LEN, dgamma, C, dbeta, C));
    OK(bn_running_update(saved, BN_MOMENTUM_WEIGHT_OF_OLD, 0.9, BN_VARIANCE_BIASED, 0, mean, C, var, C));
    OK(bn_forward_infer(plan, x, LEN, gamma, C, beta, C, mean, C, var, C, inferred, LEN));
    CHECK(bn_saved_count(saved) == N * S && bn_saved_channels(saved) == C);
    CHECK(bn_plan_len(plan) == LEN && bn_plan_channels(plan) == C && bn_plan_scratch(plan) > 0);

    double statistic[4][C];
    for (int32_t i = BN_STATISTIC_MEAN; i <= BN_STATISTIC_INV_STD; i++) {
        OK(bn_saved_read(saved, i, statistic[i], C));
    }
    for (int c = 0; c < C; c++) {
        double sum = 0, squares = 0, sum_dy = 0, sum_dy_xhat = 0;
        const double m = N * S;
#define EACH(i) for (int n = 0, i = c * S; n < N; n++, i += (C - 1) * S) for (int s = 0; s < S; s++, i++)
        EACH(i) sum += x[i];
        EACH(i) squares += (x[i] - sum / m) * (x[i] - sum / m);
        const double inv_std = 1.0 / sqrt(squares / m + 1e-3);
        EACH(i) {
            sum_dy += dy[i];
            sum_dy_xhat += dy[i] * (x[i] - sum / m) * inv_std;
        }
        EACH(i) {
            const double xhat = (x[i] - sum / m) * inv_std;
            CHECK(close_to(y[i], gamma[c] * xhat + beta[c]));
            CHECK(close_to(dx[i], gamma[c] * inv_std * (dy[i] - sum_dy / m - xhat * sum_dy_xhat / m)));
            CHECK(close_to(inferred[i], gamma[c] * (x[i] - mean[c]) / sqrt(var[c] + 1e-3) + beta[c]));
        }
        CHECK(close_to(dbeta[c], sum_dy) && close_to(dgamma[c], sum_dy_xhat));
        CHECK(close_to(statistic[BN_STATISTIC_MEAN][c], sum / m) && close_to(statistic[BN_STATISTIC_VAR][c], squares / m));
        CHECK(close_to(statistic[BN_STATISTIC_INV_STD][c], inv_std) && fabs(statistic[BN_STATISTIC_RESIDUE][c]) < 1e-15);
        CHECK(close_to(mean[c], 0.1 * sum / m) && close_to(var[c], 0.9 + 0.1 * squares / m));
    }
    bn_saved_free(saved);
    bn_plan_free(plan);
}

/* In place has the bits of out of place, and so have the halves; gradients that are not wanted change nothing. */
static void ways(void) {
    bn_plan *plan = plan_of(BN_DTYPE_F32);
    bn_saved *saved = saved_of(plan), *other = saved_of(plan);
    const float gamma[C] = {1.5f, -0.5f, 2.0f};
    float x[LEN], dy[LEN], y[LEN], dx[LEN], dgamma[C], again[LEN], dgamma_again[C];
    for (int i = 0; i < LEN; i++) {
        x[i] = (float)value(i);
        dy[i] = (float)value(3 * i + 1);
    }
    OK(bn_plan_reserve(plan, 2));
    OK(bn_plan_set_activation(plan, BN_ACTIVATION_LEAKY_RELU, 0.25));
    OK(bn_forward_train(plan, x, LEN, gamma, C, NULL, 0, y, LEN, saved));
    OK(bn_backward(plan, x, LEN, dy, LEN, saved, gamma, C, NULL, 0, dx, LEN, dgamma, C, NULL, 0));

    memcpy(again, x, sizeof x);
    OK(bn_forward_train(plan, again, LEN, gamma, C, NULL, 0, again, LEN, other));
    CHECK(memcmp(again, y, sizeof y) == 0);
    memcpy(again, dy, sizeof dy);
    OK(bn_backward(plan, x, LEN, again, LEN, other, gamma, C, NULL, 0, again, LEN, NULL, 0, NULL, 0));
    CHECK(memcmp(again, dx, sizeof dx) == 0);
    OK(bn_backward(plan, x, LEN, dy, LEN, saved, gamma, C, NULL, 0, NULL, 0, dgamma_again, C, NULL, 0));
    CHECK(memcmp(dgamma_again, dgamma, sizeof dgamma) == 0);
    /* What is read alone may be the same. */
    OK(bn_backward(plan, x, LEN, x, LEN, saved, gamma, C, gamma, C, again, LEN, NULL, 0, NULL, 0));

    bn_moments moments[C], none[C] = {{0}};
    OK(bn_moments_of(plan, x, LEN, moments, C));
    OK(bn_moments_merge(moments, C, none, C));
    OK(bn_finish(plan, moments, C, other));
    OK(bn_normalize(plan, x, LEN, gamma, C, NULL, 0, other, again, LEN));
    CHECK(memcmp(again, y, sizeof y) == 0);
    bn_gradient_sums sums[C], zeros[C] = {{0}};
    OK(bn_gradient_sums_of(plan, x, LEN, dy, LEN, other, gamma, C, NULL, 0, sums, C));
    OK(bn_gradient_sums_merge(sums, C, zeros, C));
    OK(bn_input_gradient(plan, x, LEN, dy, LEN, other, gamma, C, NULL, 0, sums, C, again, LEN));
    CHECK(memcmp(again, dx, sizeof dx) == 0);
    OK(bn_parameter_gradients(plan, other, sums, C, dgamma_again, C, NULL, 0));
    CHECK(memcmp(dgamma_again, dgamma, sizeof dgamma) == 0);

    /* Accumulated, and from the output. */
    OK(bn_plan_set_accumulation(plan, true));
    OK(bn_backward(plan, x, LEN, dy, LEN, saved, gamma, C, NULL, 0, NULL, 0, dgamma_again, C, NULL, 0));
    for (int c = 0; c < C; c++) {
        CHECK(dgamma_again[c] == 2 * dgamma[c] && dgamma[c] != 0);
    }
    OK(bn_plan_set_backward_from_output(plan, true));
    OK(bn_backward(plan, y, LEN, dy, LEN, saved, gamma, C, NULL, 0, again, LEN, NULL, 0, NULL, 0));
    for (int i = 0; i < LEN; i++) {
        CHECK(fabsf(again[i] - dx[i]) <= 1e-4f);
    }
    OK(bn_plan_set_activation(plan, BN_ACTIVATION_RELU, 0));
    REFUSED(BN_STATUS_NOT_INVERTIBLE, "undone",
            bn_backward(plan, y, LEN, dy, LEN, saved, gamma, C, NULL, 0, again, LEN, NULL, 0, NULL, 0));

    /* The next batch is smaller; an empty one has nothing to infer. */
    bn_plan *smaller, *empty;
    OK(bn_plan_with_batch(plan, N - 1, &smaller));
    CHECK(bn_plan_len(smaller) == (N - 1) * C * S);
    OK(bn_plan_with_batch(plan, 0, &empty));
    const float ones[C] = {1, 1, 1};
    OK(bn_forward_infer(empty, NULL, 0, NULL, 0, NULL, 0, gamma, C, ones, C, NULL, 0));
    REFUSED(BN_STATUS_EMPTY_BATCH, "at least one value", bn_forward_train(empty, NULL, 0, NULL, 0, NULL, 0, NULL, 0, saved));
    bn_plan_free(smaller);
    bn_plan_free(empty);
    bn_saved_free(saved);
    bn_saved_free(other);
    bn_plan_free(plan);
}

/* Each mistake has its code and its text, and leaves the output alone. */
static void mistakes(void) {
    const size_t spatial[] = {S}, vast[] = {SIZE_MAX / 2, 3};
    bn_plan *none = (bn_plan *)&failures, *plan = plan_of(BN_DTYPE_F32), *doubles = plan_of(BN_DTYPE_F64);
    bn_saved *saved = saved_of(plan), *other = saved_of(doubles), *nothing = NULL;
    float x[LEN + 1], y[LEN], before[LEN], mean[C] = {0}, var[C] = {1, 1, 1};
    for (int i = 0; i <= LEN; i++) {
        x[i] = (float)value(i);
    }
    memset(y, 77, sizeof y);
    memcpy(before, y, sizeof y);

#define NEW(dtype, layout, channels, spatial, spatial_len, eps) \
    bn_plan_new((dtype), (layout), N, (channels), (spatial), (spatial_len), (eps), &none)
    REFUSED(BN_STATUS_CHOICE, "17 is no bn_dtype", NEW(17, 0, C, spatial, 1, 1e-5));
    CHECK(none == NULL);
    REFUSED(BN_STATUS_CHOICE, "-1 is no bn_layout", NEW(0, -1, C, spatial, 1, 1e-5));
    REFUSED(BN_STATUS_SHAPE, "at least one channel", NEW(0, 0, 0, spatial, 1, 1e-5));
    REFUSED(BN_STATUS_SHAPE, "more bytes", NEW(0, 0, C, vast, 2, 1e-5));
    REFUSED(BN_STATUS_NULL, "`spatial` is null", NEW(0, 0, C, NULL, 1, 1e-5));
    REFUSED(BN_STATUS_EPS, "got -1", NEW(0, 0, C, spatial, 1, -1.0));
    REFUSED(BN_STATUS_EPS, "got NaN", NEW(0, 0, C, spatial, 1, (double)NAN));
    REFUSED(BN_STATUS_NULL, "`plan` is null", bn_plan_new(0, 0, N, C, spatial, 1, 1e-5, NULL));
    /* An empty shape may have more channels than there is memory for statistics. */
    OK(bn_plan_new(BN_DTYPE_F64, 0, 0, (size_t)1 << 59, NULL, 0, 0, &none));
    REFUSED(BN_STATUS_MEMORY, "no memory", bn_saved_new(none, &nothing));
    CHECK(nothing == NULL);
    bn_plan_free(none);

    REFUSED(BN_STATUS_EPS, "got inf", bn_plan_set_eps(plan, (double)INFINITY));
    REFUSED(BN_STATUS_CHOICE, "4 is no bn_tier", bn_plan_set_tier(plan, 4));
    REFUSED(BN_STATUS_CHOICE, "9 is no bn_activation", bn_plan_set_activation(plan, 9, 0));
    REFUSED(BN_STATUS_SLOPE, "got -0.5", bn_plan_set_activation(plan, BN_ACTIVATION_LEAKY_RELU, -0.5));
    REFUSED(BN_STATUS_NULL, "`plan` is null", bn_plan_set_threads(NULL, 2));
    REFUSED(BN_STATUS_NULL, "`plan` is null", bn_plan_reserve(NULL, 1));
    CHECK(bn_plan_len(NULL) == 0 && bn_plan_channels(NULL) == 0 && bn_plan_scratch(NULL) == 0);
    CHECK(bn_saved_count(NULL) == 0 && bn_saved_channels(NULL) == 0);

#define TRAIN(plan, x, x_len, gamma, gamma_len, y, y_len, saved) \
    bn_forward_train((plan), (x), (x_len), (gamma), (gamma_len), NULL, 0, (y), (y_len), (saved))
    REFUSED(BN_STATUS_NULL, "`plan` is null", TRAIN(NULL, x, LEN, NULL, 0, y, LEN, saved));
    REFUSED(BN_STATUS_NULL, "`saved` is null", TRAIN(plan, x, LEN, NULL, 0, y, LEN, NULL));
    REFUSED(BN_STATUS_NULL, "`x` is null", TRAIN(plan, NULL, LEN, NULL, 0, y, LEN, saved));
    REFUSED(BN_STATUS_NULL, "`y` is null", TRAIN(plan, x, LEN, NULL, 0, NULL, LEN, saved));
    REFUSED(BN_STATUS_NULL, "`gamma` is null", TRAIN(plan, x, LEN, NULL, C, y, LEN, saved));
    REFUSED(BN_STATUS_LENGTH, "`x` must hold 105 elements for this shape, got 106",
            TRAIN(plan, x, LEN + 1, NULL, 0, y, LEN, saved));
    REFUSED(BN_STATUS_LENGTH, "`y` must hold 105", TRAIN(plan, x, LEN, NULL, 0, y, SIZE_MAX, saved));
    REFUSED(BN_STATUS_LENGTH, "`gamma` must hold 3 elements for this shape, got 2", TRAIN(plan, x, LEN, mean, 2, y, LEN, saved));
    REFUSED(BN_STATUS_LENGTH, "`gamma` must hold 3 elements for this shape, got 0", TRAIN(plan, x, LEN, mean, 0, y, LEN, saved));
    REFUSED(BN_STATUS_ALIGNMENT, "`x` is not aligned", TRAIN(plan, (char *)x + 1, LEN, NULL, 0, y, LEN, saved));
    REFUSED(BN_STATUS_OVERLAP, "`y` is written and shares memory with `x`", TRAIN(plan, x, LEN, NULL, 0, x + 1, LEN, saved));
    REFUSED(BN_STATUS_OVERLAP, "shares memory with `gamma`", TRAIN(plan, x, LEN, y + 9, C, y, LEN, saved));
    REFUSED(BN_STATUS_DTYPE, "another element type", TRAIN(plan, x, LEN, NULL, 0, y, LEN, other));

#define BACKWARD(dy, dx, dgamma, dbeta) \
    bn_backward(plan, x, LEN, (dy), LEN, saved, NULL, 0, NULL, 0, (dx), (dx) == NULL ? 0 : LEN, (dgamma), C, (dbeta), C)
    REFUSED(BN_STATUS_MISSING_STATISTICS, "run a forward pass", BACKWARD(x, y, mean, var));
    REFUSED(BN_STATUS_OVERLAP, "`dx` is written and shares memory with `x`", BACKWARD(y, x, mean, var));
    REFUSED(BN_STATUS_OVERLAP, "`dgamma` is written and shares memory with `dbeta`", BACKWARD(x, y, mean, mean));
    REFUSED(BN_STATUS_OVERLAP, "`dbeta` is written and shares memory with `dy`", BACKWARD(y, (float *)NULL, mean, y));
    REFUSED(BN_STATUS_OVERLAP, "`dx` is written and shares memory with `dgamma`", BACKWARD(x, y, y + 4, mean));
    REFUSED(BN_STATUS_MISSING_STATISTICS, "got none",
            bn_running_update(saved, BN_MOMENTUM_CUMULATIVE, 0, BN_VARIANCE_BIASED, 0, mean, C, var, C));
    CHECK(memcmp(y, before, sizeof y) == 0);

    OK(TRAIN(plan, x, LEN, NULL, 0, y, LEN, saved));
#define UPDATE(momentum, weight, variance, mean, var) \
    bn_running_update(saved, (momentum), (weight), (variance), 0, (mean), C, (var), C)
    REFUSED(BN_STATUS_MOMENTUM, "got 1.5", UPDATE(BN_MOMENTUM_WEIGHT_OF_NEW, 1.5, BN_VARIANCE_BIASED, mean, var));
    REFUSED(BN_STATUS_CHOICE, "3 is no bn_momentum", UPDATE(3, 0.5, BN_VARIANCE_BIASED, mean, var));
    REFUSED(BN_STATUS_CHOICE, "2 is no bn_variance", UPDATE(BN_MOMENTUM_WEIGHT_OF_NEW, 0.5, 2, mean, var));
    REFUSED(BN_STATUS_OVERLAP, "`mean` is written", UPDATE(BN_MOMENTUM_WEIGHT_OF_NEW, 0.5, BN_VARIANCE_BIASED, mean, mean));
    REFUSED(BN_STATUS_CHOICE, "4 is no bn_statistic", bn_saved_read(saved, 4, mean, C));
    REFUSED(BN_STATUS_LENGTH, "`to` must hold 3", bn_saved_read(saved, BN_STATISTIC_MEAN, mean, C - 1));
    var[1] = -1;
    REFUSED(BN_STATUS_VARIANCE, "channel 1", UPDATE(BN_MOMENTUM_WEIGHT_OF_NEW, 0.5, BN_VARIANCE_BIASED, mean, var));
    REFUSED(BN_STATUS_VARIANCE, "channel 1", bn_forward_infer(plan, x, LEN, NULL, 0, NULL, 0, mean, C, var, C, y, LEN));
    REFUSED(BN_STATUS_VARIANCE, "channel 1", bn_freeze(plan, mean, C, var, C, saved));
    CHECK(mean[0] == 0 && var[2] == 1);

    bn_moments unlike[C] = {{1, 0, 0, 0}, {2, 0, 0, 0}, {1, 0, 0, 0}};
    REFUSED(BN_STATUS_COUNT, "channel 1 has 2", bn_finish(plan, unlike, C, saved));
    REFUSED(BN_STATUS_OVERLAP, "`into` is written", bn_moments_merge(unlike, C, unlike, C));
    REFUSED(BN_STATUS_LENGTH, "`from` must hold 3", bn_moments_merge(unlike, C, unlike, C - 1));
    OK(bn_saved_set(plan, saved, 1, mean, C, mean, C));
    var[1] = 1;
    REFUSED(BN_STATUS_UNBIASED_FROM_ONE, "got 1", UPDATE(BN_MOMENTUM_WEIGHT_OF_NEW, 0.5, BN_VARIANCE_UNBIASED, mean, var));
    REFUSED(BN_STATUS_COUNT, "this batch has 35", BACKWARD(x, y, mean, var));

    CHECK(strcmp(bn_error_message(BN_STATUS_OK), "done") == 0 && strcmp(bn_error_message(-5), "an unknown code") == 0);
    bn_plan_free(NULL);
    bn_saved_free(NULL);
    bn_saved_free(saved);
    bn_saved_free(other);
    bn_plan_free(plan);
    bn_plan_free(doubles);
}

/* Tensors large enough for threads, a plan shared by threads, and messages that are not. */
enum { WIDE = 40000, LARGE = 8 * C * WIDE };
static bn_plan *shared;
static float *input, *expected;

static void *pass(void *unused) {
    (void)unused;
    bn_saved *saved = saved_of(shared);
    float *y = malloc(LARGE * sizeof *y);
    CHECK(strcmp(bn_last_error(), "") == 0);
    for (int i = 0; i < 3; i++) {
        OK(bn_forward_train(shared, input, LARGE, NULL, 0, NULL, 0, y, LARGE, saved));
        CHECK(memcmp(y, expected, LARGE * sizeof *y) == 0);
    }
    free(y);
    bn_saved_free(saved);
    return NULL;
}

static void threads(void) {
    const size_t spatial[] = {WIDE};
    OK(bn_plan_new(BN_DTYPE_F32, BN_LAYOUT_CHANNELS_FIRST, 8, C, spatial, 1, 1e-5, &shared));
    OK(bn_plan_set_threads(shared, 1));
    OK(bn_plan_set_tier(shared, BN_TIER_PORTABLE));
    bn_saved *saved = saved_of(shared);
    input = malloc(LARGE * sizeof *input);
    expected = malloc(LARGE * sizeof *expected);
    for (int i = 0; i < LARGE; i++) {
        input[i] = (float)(i * 37LL % 1001) * 0.125f;
    }
    OK(bn_forward_train(shared, input, LARGE, NULL, 0, NULL, 0, expected, LARGE, saved));
    OK(bn_plan_set_tier(shared, BN_TIER_BEST));
    OK(bn_plan_set_threads(shared, 3));
    pthread_t thread[3];
    for (int i = 0; i < 3; i++) {
        CHECK(pthread_create(&thread[i], NULL, pass, NULL) == 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(thread[i], NULL);
    }
    free(input);
    free(expected);
    bn_saved_free(saved);
    bn_plan_free(shared);
}

int main(void) {
    CHECK(bn_abi_version() == BN_ABI_VERSION);
    CHECK(strcmp(bn_version(), EXPECTED_VERSION) == 0);
    CHECK(strcmp(bn_last_error(), "") == 0);
    numbers();
    ways();
    mistakes();
    threads();
    return failures == 0 ? 0 : 1;
}
