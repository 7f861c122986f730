// What lies where in the on-chip stack: slabs of weights, records of chunks, the plan that every part shares.
//
// A layer's outputs are worked off in chunks of kChunk channels, its inputs in slabs of kSlab. The weights of one
// chunk and slab are one slab image [kChunk outputs][kSlab inputs] of 16-bit values, 16 bytes swizzled by the row,
// and travel as they lie. A chunk's record holds what its tail needs: bias, noise strength, ToRGB weights.
//
// The first layer's inputs come in two parts: up to kRegisterInputs held in registers (Fourier features, or the
// first channels of x), and the rest streamed as slabs [pixels][kSlab] (the table's embeddings, or the rest of x).
#pragma once

#include <cstdint>

namespace cips {

constexpr int kMaxStackLayers = 64;
constexpr int kChunk = 128;
constexpr int kSlab = 64;
constexpr int kRegisterInputs = 512;
constexpr int kRegisterSlabs = kRegisterInputs / kSlab;
constexpr int kMaxRgbChannels = 3;

constexpr int kCluster = 2;           // blocks that share one stream of weights
constexpr int kConsumers = 2;         // warpgroups of a block that compute
constexpr int kWarpgroupPixels = 64;  // pixels of a warpgroup
constexpr int kWarpPixels = 16;
constexpr int kBlockPixels = kConsumers * kWarpgroupPixels;
constexpr int kGroupPixels = kCluster * kBlockPixels;  // pixels of one unit of work
constexpr int kMadeBuffers = 1;                        // of made rows, at most
constexpr int kMakers = 2;  // warps beside the consumers that make rows of input, see stack_made.cuh
constexpr int kStackThreads = 128 * (kConsumers + 1);

constexpr int kSlabBytes = kChunk * kSlab * 2;
constexpr int kInputSlabBytes = kWarpgroupPixels * kSlab * 2;  // one warpgroup's
static_assert(kConsumers * kInputSlabBytes == kSlabBytes, "streamed inputs of a block fill one slot of the ring");

// Fourier weights of a slab of 64 channels: for each step of four channels of thread t of a quad, which are 16 t + 4
// step and on, B_x, B_y and b of the four, the quad's threads side by side.

// Shared memory of a block. The parking area holds, for each warpgroup, the positions of a layer's output that are done
// while the layer's input is still needed; the last chunk (of blends its second half) never parks.
constexpr int kPositionBytes = kWarpgroupPixels * kSlab * 2;        // one warpgroup's
constexpr int kParked = kRegisterSlabs - kChunk / kSlab;            // positions
constexpr int kKeptBytes = kWarpgroupPixels * kRegisterInputs * 2;  // of a residual block's input, a warpgroup's
constexpr int kMaxStages = 8;                                       // slots of the ring
constexpr int kMaxRecords = 2;                                      // buffers of records

/// What lies in shared memory, and what a record holds, for images of one style (kMost is 1) or blends a pixel.
template <int kMost>
struct StackShape;

template <>
struct StackShape<1> {
    static constexpr int kStyles = 1;
    static constexpr bool kBlends = false;
    static constexpr int kStages = kMaxStages;
    static constexpr int kRecords = kMaxRecords;
    static constexpr int kTurn = kRegisterSlabs;  // see first_products
    static constexpr int kParkBytes = kParked * kPositionBytes;

    static constexpr int kOutputs = kChunk;               // channels of a record
    static constexpr int kBias = 0;                       // kOutputs floats, see start_chunk
    static constexpr int kStrength = kBias + 4 * kChunk;  // a float, 12 bytes of padding
    // ToRGB, for each 8 channels the 8 weights of each colour. The product reads 8 colours: those that do not exist are
    // whatever follows, up to kRgbBeyond bytes after the record; nobody looks at them.
    static constexpr int kRgb = kStrength + 16;
    static constexpr int kRgbStep = kMaxRgbChannels * 16;  // bytes of 8 channels
    static constexpr int kRgbBeyond = (8 - kMaxRgbChannels) * 16;
    static constexpr int kRecordBytes = kRgb + kChunk / 8 * kRgbStep;
    static_assert(kRecordBytes % 16 == 0, "records travel by bulk copy");

    static constexpr int kRingOffset = kConsumers * kParkBytes;
    static constexpr int kRecordOffset = kRingOffset + kStages * kSlabBytes;
    static constexpr int kEnd = kRecordOffset + kRecords * kRecordBytes;

    // Fourier features: each of a step's B_x, B_y and b. Float4s of a slab:
    static constexpr int kFourierParts = 3;
    static constexpr int kFourierSlab = 4 * kFourierParts * 4;
};

/// Blends of two styles. A chunk is worked off in halves of 64 outputs, which leave registers for the forms of the
/// demodulation; each has a record. Weights past layer 0 come a half and two slabs at a time, both images of 64 outputs
/// in one slot, the second unused after an odd number of slabs.
template <>
struct StackShape<2> {
    static constexpr int kStyles = 2;
    static constexpr bool kBlends = true;
    static constexpr int kForms = 3;  // pairs k <= l of styles
    static constexpr int kStages = 6;
    static constexpr int kRecords = kMaxRecords;
    static constexpr int kParkBytes = (kRegisterSlabs - 1) * kPositionBytes;

    // Slabs of a chunk of layer 0 after which the other warpgroup begins it. Fewer slots than a chunk has slabs: the
    // last slabs have no slot before the other has let go of the first.
    static constexpr int kTurn = 3;

    static constexpr int kOutputs = kChunk / 2;
    // Forms q_kl = sum_j (c W_ij)^2 s_kj s_lj, twice it where k < l: an operand of 16 columns, the first eight of each
    // channel and then the others. What the rounding of q to bfloat16 left is in the second eight:
    // {q_00, q_00, q_01, q_01, q_11, q_11, eps, 0} for a left side of {f, what its rounding left, ..., 1, 0} twice.
    static constexpr int kFormRow = 16;  // bytes of eight columns
    static constexpr int kFormStep = kOutputs * kFormRow;
    static constexpr int kChannel = 0;
    static constexpr int kBias = kChannel + 2 * kFormStep;  // kOutputs floats, see start_chunk
    static constexpr int kStrength = kBias + 4 * kOutputs;
    static constexpr int kStyle = kStrength + 16;   // the next layer's styles, of 16-bit pairs
    static constexpr int kStyleStep = 4 * kStyles;  // 16-bit values of a thread for 16 channels
    // ToRGB, for each 8 channels the 8 weights of 4 colours of each style
    static constexpr int kRgb = kStyle + kStyles * 2 * kOutputs;
    static constexpr int kRgbStep = 128;
    static constexpr int kRecordBytes = kRgb + kOutputs / 8 * kRgbStep;
    static_assert(kRecordBytes % 16 == 0 && kChannel % 16 == 0, "records travel by bulk copy");

    static constexpr int kRingOffset = kConsumers * kParkBytes;
    static constexpr int kRecordOffset = kRingOffset + kStages * kSlabBytes;
    static constexpr int kBlendOffset = kRecordOffset + kRecords * kRecordBytes;  // the blend's weights of each pixel
    static constexpr int kColourOffset = kBlendOffset + kBlockPixels * kStyles * 4;
    static constexpr int kNoiseOffset = kColourOffset + 128 * kConsumers * 16;
    static constexpr int kEnd = kNoiseOffset + 128 * kConsumers * 4;
    static_assert(kRingOffset % 1024 == 0, "slabs are swizzled");

    // Each of a step's B_x, B_y and b, and of the styles of layer 0
    static constexpr int kFourierParts = 3 + kStyles;
    static constexpr int kFourierSlab = 4 * kFourierParts * 4;
};

constexpr int kMaxBlend = 2;  // styles of a blend
using BlendShape = StackShape<kMaxBlend>;
constexpr int kHalves = kChunk / BlendShape::kOutputs;  // records of a chunk of a blend

/// The chain of gradients, see stack_chain.cuh. A record holds the ToRGB that reads a layer's output, for each channel
/// the weights of kMaxRgbChannels colours, the same again, and zeros: 16 bytes, an operand's row.
struct ChainShape {
    static constexpr int kStyles = 1;
    static constexpr bool kBlends = false;
    static constexpr int kStages = kMaxStages;
    static constexpr int kRecords = 1;
    static constexpr int kTurn = kRegisterSlabs;
    static constexpr int kParkBytes = kParked * kPositionBytes;
    static constexpr int kOutputs = kChunk;
    static constexpr int kRgbRow = 16;  // bytes of a channel
    static constexpr int kRecordBytes = kChunk * kRgbRow;
    // in front of the ring: a product's second eight columns, which are zeros times whatever it reads, stay in bounds
    static constexpr int kRecordOffset = kConsumers * kParkBytes;
    static constexpr int kRingOffset = kRecordOffset + kRecords * kRecordBytes;
    static constexpr int kEnd = kRingOffset + kStages * kSlabBytes;
    static_assert(kRingOffset % 1024 == 0, "slabs are swizzled");
};

constexpr int kBarrierOffset = StackShape<1>::kEnd;
constexpr int kUnitOffset =
    kBarrierOffset + 2 * 8 * (kMaxStages + kMaxRecords);  // image and group in hand, of each warp
constexpr int kSeedOffset = kUnitOffset + 8 * 4 * kConsumers;
// Of the rows that a block makes itself, see stack_made.cuh: barriers, makers' units, and how many units each has had
// to do with, the thread that fetches them and every consumer warp.
constexpr int kMadeOffset = (kSeedOffset + 8 + 15) / 16 * 16;
constexpr int kMadeUnits = kMadeOffset + 2 * kMadeBuffers * 8;
constexpr int kMadeFetched = kMadeUnits + kMakers * 16;
constexpr int kMadeRead = kMadeFetched + 4;
constexpr int kStackSharedBytes = kMadeRead + 4 * 4 * kConsumers;
static_assert(kUnitOffset - kBarrierOffset >= StackShape<1>::kRgbBeyond,
              "reading beyond the last record stays in shared memory");
static_assert(BlendShape::kEnd <= kBarrierOffset && ChainShape::kEnd <= kBarrierOffset);
static_assert(kMaxStages == kRegisterSlabs, "a full layer takes slot i for slab i");
static_assert(kStackSharedBytes <= 227 * 1024, "shared memory of a block");

/// One layer. positions: which of the 8 slab positions of the registers its input occupies. A layer's chunks but the
/// last land at positions 2 c and 2 c + 1, the last at 6 and 7.
struct StackLayer {
    int64_t slab_offset;  // bytes, in an image's slabs
    int32_t in_features;
    int32_t out_features;
    int32_t weight_offset;  // elements, in the caller's flat weights
    int32_t style_offset;   // column of the styles
    int32_t bias_offset;
    int32_t first_record;  // in an image's records
    int32_t skip_offset;   // elements: the skip's matrix of a block that begins here, where skip_chunks > 0
    uint8_t chunks;
    uint8_t positions;
    uint8_t slabs;  // of 64 input channels, streamed ones included
    uint8_t slots;  // of the ring that a chunk's weights take
    uint8_t rgb;    // whether a ToRGB reads after it
    // Residual blocks: (y + skip(x)) / sqrt(2). Activations stand for themselves over g (1 - s), those after a block
    // over g (1 - s) / sqrt(2): the sum needs no factor but the skip's.
    uint8_t skip_chunks;  // chunks of the skip's product, which go before the layer's
    uint8_t keeps_input;  // a block with no matrix begins here
    uint8_t adds_skip;    // a block ends here; AddsSkip
    uint8_t after_block;  // its input is a block's output
    uint8_t number;       // of the layer whose output, or its gradient, this makes
};

/// What the kept skip is multiplied with: kHalved is sqrt(1/2), for an input that is itself a block's output.
enum AddsSkip : uint8_t { kNoSkip, kAsItIs, kHalved };

/// One ToRGB.
struct StackRgb {
    int64_t weight_offset;
    int32_t style_offset;
    int32_t bias_offset;
    int32_t layer;
};

}  // namespace cips
