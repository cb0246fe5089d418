// What a step on a CPU computes, as single calls: attention over bfloat16 pages, of single rows and
// of prompt chunks, a model's last norm, a head's product with weights in eight bits, what stands in a
// dropped sublayer's place with maps in eight bits, layers' products with weights in four, and all of
// these around compiled layers, one after the other. For AVX-512; native.py compiles this file, it and
// forward.py call it. Products in four bits are called by the compiled functions of ahead.py, through
// torch's stable C interface.

#include "cpp/chunks.h"
#include "cpp/forward.h"
#include "cpp/four_bits.h"
#include "cpp/head.h"
#include "cpp/maps.h"
#include "cpp/norms.h"
#include "cpp/rows.h"
