/* Runs the model on every sample of input.bin and writes the outputs to output.bin.
 *
 * A sample is all inputs, one after the other; so is what is written for it. counters.bin receives
 * 32-bit numbers: the ticks of every sample, then the deepest use of the stack in bytes. */
#include "host.h"
#include "model-io.h" /* its macros are Model_...: those of a model are in capitals */

#define ALIGNMENT 16u
#define PAINT 0xA5A5A5A5u

static const uint32_t input_bytes[] = Model_INPUT_BYTES;
static const uint32_t output_bytes[] = Model_OUTPUT_BYTES;
#define INPUTS (sizeof(input_bytes) / sizeof(input_bytes[0]))
#define OUTPUTS (sizeof(output_bytes) / sizeof(output_bytes[0]))

static uint8_t arena[Model_ARENA_BYTES + 1] __attribute__((aligned(16)));
static uint8_t input_buffer[Model_INPUT_BUFFER_BYTES] __attribute__((aligned(16)));
static uint8_t output_buffer[Model_OUTPUT_BUFFER_BYTES] __attribute__((aligned(16)));
static const void *inputs[INPUTS];
static void *outputs[OUTPUTS];

static uint32_t aligned(uint32_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static void lay_out(void) {
    uint32_t offset = 0;
    for (uint32_t i = 0; i < INPUTS; ++i) {
        inputs[i] = input_buffer + offset;
        offset += aligned(input_bytes[i]);
    }
    offset = 0;
    for (uint32_t i = 0; i < OUTPUTS; ++i) {
        outputs[i] = output_buffer + offset;
        offset += aligned(output_bytes[i]);
    }
}

/* 1: a whole sample; 0: the end of the file. */
static int read_sample(int file) {
    for (uint32_t i = 0; i < INPUTS; ++i) {
        uint32_t got = host_read(file, (void *)(uintptr_t)inputs[i], input_bytes[i]);
        if (got == 0 && i == 0) return 0;
        if (got != input_bytes[i]) {
            host_print("input.bin ends within a sample\n");
            host_exit(5);
        }
    }
    return 1;
}

/* Fills the unused stack, from its limit to a little below this function. */
__attribute__((noinline)) static void paint_stack(void) {
    volatile uint32_t *limit = (volatile uint32_t *)host_stack_limit();
    volatile uint32_t *top = (volatile uint32_t *)((uintptr_t)__builtin_frame_address(0) - 64);
    if (limit == 0) return;
    for (volatile uint32_t *word = limit; word < top; ++word) *word = PAINT;
}

/* Bytes between `top` and the lowest word that has changed. */
__attribute__((noinline)) static uint32_t stack_used(uintptr_t top) {
    volatile uint32_t *word = (volatile uint32_t *)host_stack_limit();
    if (word == 0) return 0;
    while ((uintptr_t)word < top && *word == PAINT) ++word;
    return (uint32_t)(top - (uintptr_t)word);
}

static int must_open(const char *path, int for_writing) {
    int file = host_open(path, for_writing);
    if (file < 0) {
        host_print("cannot open ");
        host_print(path);
        host_print("\n");
        host_exit(6);
    }
    return file;
}

static void must_write(int file, const void *from, uint32_t bytes) {
    if (host_write(file, from, bytes) != 0) {
        host_print("cannot write the results\n");
        host_exit(6);
    }
}

int main(void) {
    int data = must_open("input.bin", 0);
    int results = must_open("output.bin", 1);
    int counters = must_open("counters.bin", 1);
    uint32_t used = 0;
    uint32_t period = host_ticks_period();

    lay_out();
    mark_begin(); /* what the marks cost themselves */
    mark_end();
    while (read_sample(data)) {
        uint32_t before, ticks, depth;
        int status;
        paint_stack();
        before = host_ticks();
        mark_begin();
        status = Model_RUN(inputs, outputs, arena);
        mark_end();
        ticks = host_ticks() - before;
        depth = stack_used((uintptr_t)__builtin_frame_address(0));
        if (depth > used) used = depth;
        if (status != 0) {
            host_print("the model returned an error\n");
            host_exit(4);
        }
        for (uint32_t i = 0; i < OUTPUTS; ++i) must_write(results, outputs[i], output_bytes[i]);
        if (period != 0) ticks %= period;
        must_write(counters, &ticks, sizeof ticks);
    }
    must_write(counters, &used, sizeof used);
    host_close(data);
    host_close(results);
    host_close(counters);
    return 0;
}
