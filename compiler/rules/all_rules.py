"""Every rule module, imported: this fills the table."""

import shardc.compiler.rules.attention
import shardc.compiler.rules.batch_norm
import shardc.compiler.rules.checks
import shardc.compiler.rules.conv
import shardc.compiler.rules.creation
import shardc.compiler.rules.ctc
import shardc.compiler.rules.embedding
import shardc.compiler.rules.group_norm
import shardc.compiler.rules.index
import shardc.compiler.rules.loss
import shardc.compiler.rules.lstsq
import shardc.compiler.rules.matmul
import shardc.compiler.rules.moment
import shardc.compiler.rules.nll
import shardc.compiler.rules.norm
import shardc.compiler.rules.pointwise
import shardc.compiler.rules.pool
import shardc.compiler.rules.pool_windows
import shardc.compiler.rules.random
import shardc.compiler.rules.reduce
import shardc.compiler.rules.slice
import shardc.compiler.rules.softmax
import shardc.compiler.rules.sort
import shardc.compiler.rules.view  # noqa: F401
