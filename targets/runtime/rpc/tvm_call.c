/* The model as a function that TVM's RPC server loads and calls: run(input..., output...), tensors
 * of the board's. One call at a time: the arena is here. */
#include <stdint.h>
#include <tvm/ffi/c_api.h>

#include "model-io.h" /* its macros are Model_...: those of a model are in capitals */

static const uint32_t input_bytes[] = Model_INPUT_BYTES;
static const uint32_t output_bytes[] = Model_OUTPUT_BYTES;
#define INPUTS ((int32_t)(sizeof(input_bytes) / sizeof(input_bytes[0])))
#define OUTPUTS ((int32_t)(sizeof(output_bytes) / sizeof(output_bytes[0])))

static uint8_t arena[Model_ARENA_BYTES + 1] __attribute__((aligned(64)));

static void *data_of(const TVMFFIAny *argument) {
    const DLTensor *tensor;
    if (argument->type_index == kTVMFFIDLTensorPtr)
        tensor = argument->v_ptr;
    else if (argument->type_index == kTVMFFITensor)
        tensor = (const DLTensor *)((const char *)argument->v_obj + sizeof(TVMFFIObject));
    else
        return 0;
    return (char *)tensor->data + tensor->byte_offset;
}

static int refused(const char *why) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", why);
    return -1;
}

int __tvm_ffi_run(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result);

int __tvm_ffi_run(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
    const void *inputs[INPUTS];
    void *outputs[OUTPUTS];
    (void)self, (void)result;
    if (count != INPUTS + OUTPUTS) return refused("run takes all inputs, then all outputs");
    for (int32_t i = 0; i < count; ++i) {
        void *data = data_of(&arguments[i]);
        if (data == 0) return refused("run takes tensors");
        if (i < INPUTS) inputs[i] = data;
        else outputs[i - INPUTS] = data;
    }
    if (Model_RUN(inputs, outputs, arena) != 0) return refused("the model returned an error");
    return 0;
}
