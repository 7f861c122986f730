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
constexpr int kBlockPixels = kConsumers * kWarpgroupPixels;
constexpr int kGroupPixels = kCluster * kBlockPixels;  // pixels of one unit of work
constexpr int kStackThreads = 128 * (kConsumers + 1);

constexpr int kSlabBytes = kChunk * kSlab * 2;
constexpr int kInputSlabBytes = kWarpgroupPixels * kSlab * 2;  // one warpgroup's
static_assert(kConsumers * kInputSlabBytes == kSlabBytes, "streamed inputs of a block fill one slot of the ring");

// Fourier weights of a slab of 64 channels: for each step of four channels of thread t of a quad, which are 16 t + 4
// step and on, B_x, B_y and b of the four, the quad's threads side by side.

// Shared memory of a block. The parking area holds, for each warpgroup, the chunks of a layer's output that are
// done while the layer's input is still needed; the last chunk never parks.
constexpr int kParkedChunks = kRegisterInputs / kChunk - 1;
constexpr int kParkBytes = kParkedChunks * kWarpgroupPixels * kChunk * 2;
constexpr int kKeptBytes = kWarpgroupPixels * kRegisterInputs * 2;  // of a residual block's input, a warpgroup's
constexpr int kMaxStages = 8;                                       // slots of the ring
constexpr int kMaxRecords = 2;                                      // buffers of records
constexpr int kParkEnd = kConsumers * kParkBytes;

/// What a kernel for images of one style (kMost is 1), or for blends of up to kMost styles a pixel, keeps in a record,
/// and how many slots that leaves to the ring.
template <int kMost>
struct StackShape {
    static constexpr int kStyles = kMost;
    static constexpr bool kBlends = kStyles > 1;
    static constexpr int kForms = kBlends ? kStyles * (kStyles + 1) / 2 : 0;
    static constexpr int kStages = kMaxStages - (kBlends ? kStyles / 2 : 0);
    static constexpr int kRecords = kMaxRecords;

    // Slabs of a chunk after which the other warpgroup begins it. Fewer slots than a chunk has slabs: the last slabs
    // have no slot before the other has let go of the first.
    static constexpr int kTurn = kBlends ? kStages - 3 : kRegisterSlabs;

    static constexpr int kBias = 0;                                       // kChunk floats, see start_chunk
    static constexpr int kStrength = kBias + (kBlends ? 0 : 4 * kChunk);  // a float, 12 bytes of padding
    // Blends have instead of the bias for each channel four floats: for each pair k <= l of styles sum_j (c W_ij)^2
    // s_kj s_lj, twice it where k < l, and the bias. Then the next layer's styles, of 16-bit pairs
    static constexpr int kChannel = kStrength + 16;
    static constexpr int kStyle = kChannel + (kBlends ? 16 * kChunk : 0);
    static constexpr int kStyleStep = 4 * kStyles;  // 16-bit values of a thread for 16 channels
    // ToRGB, for each 8 channels the 8 weights of each colour. One style has kMaxRgbChannels of them: the product reads
    // 8 colours, and those that do not exist are whatever follows, up to kRgbBeyond bytes after the record; nobody
    // looks at them. Two styles to a product have 4 colours each.
    static constexpr int kRgb = kStyle + (kBlends ? kStyles * 2 * kChunk : 0);
    static constexpr int kRgbStep = kBlends ? 128 : kMaxRgbChannels * 16;  // bytes of 8 channels
    static constexpr int kRgbProducts = kBlends ? kStyles / 2 : 1;
    static constexpr int kRgbBytes = kChunk / 8 * kRgbStep;  // of a product
    static constexpr int kRgbBeyond = kBlends ? 0 : (8 - kMaxRgbChannels) * 16;
    static constexpr int kRecordBytes = kRgb + kRgbProducts * kRgbBytes;
    static_assert(kRecordBytes % 16 == 0, "records travel by bulk copy");

    static constexpr int kRingOffset = kParkEnd;
    static constexpr int kRecordOffset = kRingOffset + kStages * kSlabBytes;
    static constexpr int kBlendOffset = kRecordOffset + kRecords * kRecordBytes;  // the blend's weights of each pixel
    static constexpr int kColourOffset = kBlendOffset + (kBlends ? kBlockPixels * kStyles * 4 : 0);
    static constexpr int kNoiseOffset = kColourOffset + (kBlends ? kRgbProducts * 128 * kConsumers * 16 : 0);
    static constexpr int kEnd = kNoiseOffset + (kBlends ? 128 * kConsumers * 4 : 0);

    // Fourier features: each of a step's B_x, B_y and b, and with blends of the styles of layer 0. Float4s of a slab:
    static constexpr int kFourierParts = 3 + (kBlends ? kStyles : 0);
    static constexpr int kFourierSlab = 4 * kFourierParts * 4;
};

constexpr int kMaxBlend = 2;  // styles of a blend
using BlendShape = StackShape<kMaxBlend>;

/// The chain of gradients, see stack_chain.cuh. A record holds the ToRGB that reads a layer's output, for each channel
/// the weights of kMaxRgbChannels colours, the same again, and zeros: 16 bytes, an operand's row.
struct ChainShape {
    static constexpr int kStyles = 1;
    static constexpr bool kBlends = false;
    static constexpr int kStages = kMaxStages;
    static constexpr int kRecords = 1;
    static constexpr int kTurn = kRegisterSlabs;
    static constexpr int kRgbRow = 16;  // bytes of a channel
    static constexpr int kRecordBytes = kChunk * kRgbRow;
    // in front of the ring: a product's second eight columns, which are zeros times whatever it reads, stay in bounds
    static constexpr int kRecordOffset = kParkEnd;
    static constexpr int kRingOffset = kRecordOffset + kRecords * kRecordBytes;
    static constexpr int kEnd = kRingOffset + kStages * kSlabBytes;
    static_assert(kRingOffset % 1024 == 0, "slabs are swizzled");
};

constexpr int kBarrierOffset = StackShape<1>::kEnd;
constexpr int kUnitOffset =
    kBarrierOffset + 2 * 8 * (kMaxStages + kMaxRecords);  // image and group in hand, of each warp
constexpr int kSeedOffset = kUnitOffset + 8 * 4 * kConsumers;
constexpr int kStackSharedBytes = kSeedOffset + 8;
static_assert(kUnitOffset - kBarrierOffset >= StackShape<1>::kRgbBeyond,
              "reading beyond the last record stays in shared memory");
static_assert(BlendShape::kEnd <= kBarrierOffset && ChainShape::kEnd <= kBarrierOffset);
static_assert(StackShape<1>::kStages == kRegisterSlabs, "a full layer takes slot i for slab i");
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
