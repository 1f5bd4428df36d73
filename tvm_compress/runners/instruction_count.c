/* Counts executed instructions for QEMU (plugin API version 1), in all and by function.
 *
 *   -plugin instruction_count.so,symbols=FILE,out=FILE
 *
 * `symbols` has lines "M address" (a mark: when the instruction there is executed, all counters are
 * written to `out`) and "R first end" (a range with a counter of its own; sorted, not overlapping).
 * A row of `out` is 64-bit numbers: the mark's place in the file, the instructions executed before
 * it, and those of every range.
 *
 * A block is counted when it is entered. It is left early by exceptions alone, and where timers are
 * read under -icount; neither happens within a model.
 *
 * The declarations are of QEMU's documented interface, "QEMU TCG Plugins"; Debian ships no header. */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info;
enum { INLINE_ADD_U64 = 0, CALLBACK_READS_NO_REGISTERS = 0 };

typedef void (*translated)(qemu_plugin_id_t id, struct qemu_plugin_tb *block);
typedef void (*executed)(unsigned int cpu, void *data);
typedef void (*ended)(qemu_plugin_id_t id, void *data);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, translated callback);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, ended callback, void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *block, size_t index);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *instruction);
void qemu_plugin_register_vcpu_insn_exec_cb(
    struct qemu_plugin_insn *instruction, executed callback, int flags, void *data);
void qemu_plugin_register_vcpu_insn_exec_inline(
    struct qemu_plugin_insn *instruction, int operation, void *counter, uint64_t addend);

EXPORT int qemu_plugin_version = 1;

typedef struct {
    uint64_t first, end;
} range;
typedef struct {
    uint64_t index;
    uint64_t later; /* instructions of the same block from the mark on: counted, not executed */
} place;

static uint64_t *marks;
static range *ranges;
static size_t mark_count, range_count;
static uint64_t *counters; /* [0]: all; [1 + i]: of ranges[i] */
static FILE *out;

static void stop(const char *what, const char *detail) {
    fprintf(stderr, "instruction_count: %s%s\n", what, detail);
    exit(9);
}

static void *grown(void *old, size_t count, size_t bytes) {
    void *new_one = realloc(old, (count + 1) * bytes);
    if (new_one == NULL) stop("out of memory", "");
    return new_one;
}

/* The range that holds `address`, or `range_count`. */
static size_t range_of(uint64_t address) {
    size_t low = 0, high = range_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle].end <= address) low = middle + 1;
        else high = middle;
    }
    return low < range_count && ranges[low].first <= address ? low : range_count;
}

static void write_numbers(const uint64_t *numbers, size_t count) {
    if (fwrite(numbers, sizeof *numbers, count, out) != count) stop("cannot write the counts", "");
}

static void at_mark(unsigned int cpu, void *data) {
    const place *mark = data;
    uint64_t head[2] = {mark->index, counters[0] - mark->later};
    (void)cpu;
    write_numbers(head, 2);
    write_numbers(counters + 1, range_count);
}

static void at_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    size_t count = qemu_plugin_tb_n_insns(block);
    struct qemu_plugin_insn *first = qemu_plugin_tb_get_insn(block, 0);
    size_t run_range = range_count, run_length = 0;
    struct qemu_plugin_insn *run_first = first;
    (void)id;
    qemu_plugin_register_vcpu_insn_exec_inline(first, INLINE_ADD_U64, &counters[0], count);
    for (size_t i = 0; i <= count; ++i) {
        struct qemu_plugin_insn *here = i < count ? qemu_plugin_tb_get_insn(block, i) : NULL;
        uint64_t address = here == NULL ? 0 : qemu_plugin_insn_vaddr(here);
        size_t inside = here == NULL ? range_count : range_of(address);
        if (here == NULL || inside != run_range) {
            if (run_length > 0 && run_range < range_count)
                qemu_plugin_register_vcpu_insn_exec_inline(
                    run_first, INLINE_ADD_U64, &counters[1 + run_range], run_length);
            run_range = inside;
            run_first = here;
            run_length = 0;
        }
        ++run_length;
        for (size_t m = 0; here != NULL && m < mark_count; ++m) {
            if (marks[m] != address) continue;
            place *mark = grown(NULL, 0, sizeof *mark); /* translated code keeps it for good */
            mark->index = m;
            mark->later = count - i;
            qemu_plugin_register_vcpu_insn_exec_cb(
                here, at_mark, CALLBACK_READS_NO_REGISTERS, mark);
        }
    }
}

static void at_end(qemu_plugin_id_t id, void *data) {
    (void)id;
    (void)data;
    if (fclose(out) != 0) stop("cannot write the counts", "");
}

static void read_symbols(const char *path) {
    char line[128];
    uint64_t first, end;
    FILE *file = fopen(path, "r");
    if (file == NULL) stop("cannot read ", path);
    while (fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "M %" SCNx64, &first) == 1) {
            marks = grown(marks, mark_count, sizeof *marks);
            marks[mark_count++] = first;
        } else if (sscanf(line, "R %" SCNx64 " %" SCNx64, &first, &end) == 2) {
            ranges = grown(ranges, range_count, sizeof *ranges);
            ranges[range_count++] = (range){first, end};
        } else {
            stop("not understood: ", line);
        }
    }
    fclose(file);
}

EXPORT int qemu_plugin_install(
    qemu_plugin_id_t id, const struct qemu_info *info, int argc, char **argv) {
    (void)info;
    for (int i = 0; i < argc; ++i) {
        if (strncmp(argv[i], "symbols=", 8) == 0) read_symbols(argv[i] + 8);
        else if (strncmp(argv[i], "out=", 4) == 0) out = fopen(argv[i] + 4, "wb");
        else stop("unknown option ", argv[i]);
    }
    if (out == NULL || mark_count == 0) stop("needs symbols= and out=, and a mark", "");
    counters = calloc(1 + range_count, sizeof *counters);
    if (counters == NULL) stop("out of memory", "");
    qemu_plugin_register_vcpu_tb_trans_cb(id, at_translation);
    qemu_plugin_register_atexit_cb(id, at_end, NULL);
    return 0;
}
