//! Who and what there is in the valley.

use super::teller::Frame;

/// A list of alternatives.
pub(super) type Words = &'static [&'static str];

/// Someone with a name.
pub(super) struct Person {
    pub name: &'static str,
    pub kind: &'static str,
    pub she: bool,
}

impl Person {
    pub fn is_child(&self) -> bool {
        matches!(self.kind, "girl" | "boy")
    }

    pub fn pronoun(&self, he: &str) -> &'static str {
        match (he, self.she) {
            ("he", true) => "she",
            ("he", false) => "he",
            ("him", true) | ("his", true) => "her",
            ("him", false) => "him",
            ("his", false) => "his",
            ("himself", true) => "herself",
            ("himself", false) => "himself",
            _ => panic!("there is no pronoun {he}"),
        }
    }
}

const fn she(name: &'static str, kind: &'static str) -> Person {
    Person { name, kind, she: true }
}

const fn he(name: &'static str, kind: &'static str) -> Person {
    Person { name, kind, she: false }
}

/// The children and the animals of the valley are friends.
const CHILDREN_AND_ANIMALS: &[Person] = &[
    she("Tilly", "girl"),
    she("Nora", "girl"),
    she("Mina", "girl"),
    she("Ruby", "girl"),
    she("Flora", "girl"),
    she("Greta", "girl"),
    he("Otto", "boy"),
    he("Finn", "boy"),
    he("Leo", "boy"),
    he("Emil", "boy"),
    he("Theo", "boy"),
    he("Kit", "boy"),
    she("Bramble", "hedgehog"),
    she("Hazel", "squirrel"),
    she("Clover", "rabbit"),
    she("Puddle", "duck"),
    she("Olive", "owl"),
    she("Fern", "deer"),
    she("Pepper", "cat"),
    she("Willow", "hare"),
    she("Sorrel", "goat"),
    he("Moss", "badger"),
    he("Rusty", "fox"),
    he("Pip", "mouse"),
    he("Barnaby", "bear"),
    he("Tumble", "otter"),
    he("Nib", "mole"),
    he("Biscuit", "dog"),
    he("Thistle", "lamb"),
    he("Jasper", "raccoon"),
];

const GROWN_UPS: &[Person] = &[
    she("Grandma", ""),
    he("Grandpa", ""),
    she("{his} mother", ""),
    he("{his} father", ""),
    she("{his} aunt", ""),
    he("{his} uncle", ""),
];

const VILLAGERS: &[Person] = &[
    she("the baker", ""),
    he("the miller", ""),
    she("the shepherd", ""),
    he("the ferryman", ""),
    she("the gardener", ""),
    he("the clockmaker", ""),
    she("the weaver", ""),
    he("the beekeeper", ""),
];

/// Who may play a role of the story: h the hero, f the friend, g a grown-up of the family, v a villager.
pub(super) fn people(role: &str) -> &'static [Person] {
    match role {
        "h" | "f" => CHILDREN_AND_ANIMALS,
        "g" => GROWN_UPS,
        "v" => VILLAGERS,
        _ => panic!("there is no role {role}"),
    }
}

macro_rules! frames {
    ($($name:ident: [$({ $($key:ident: [$($word:literal),* $(,)?]),* $(,)? }),* $(,)?])*) => {
        $(pub(super) const $name: &[Frame] = &[$(&[$((stringify!($key), &[$($word),*])),*]),*];)*
    };
}

frames! {
// Where stories happen: spots are where things hide.
PLACES: [
    {
        place: ["the lake"],
        at: ["at the lake"],
        spot: ["under the old boat", "between the reeds", "behind the big rock", "on the wooden pier"],
        view: ["The water glittered in the sun.", "A white swan was sailing past the reeds.", "Small waves were washing over the stones."],
    },
    {
        place: ["the river"],
        at: ["by the river"],
        spot: ["under the bridge", "between two white stones", "in the roots of a willow", "behind the water wheel"],
        view: ["The water was singing over the stones.", "A silver fish jumped and made a ring.", "The water wheel went round and round."],
    },
    {
        place: ["the green hill"],
        at: ["on the green hill"],
        spot: ["behind the stone wall", "under a thorn bush", "beside the old bench", "in a hole in the ground"],
        view: ["From up there the village looked as small as a toy.", "The wind was combing the grass.", "Clouds were sailing over it like ships."],
    },
    {
        place: ["the meadow"],
        at: ["in the meadow"],
        spot: ["under a big leaf", "between the daisies", "behind a heap of hay", "beside an old post"],
        view: ["Bees were humming in the grass.", "Red poppies were nodding in the breeze.", "A thousand daisies had opened their eyes."],
    },
    {
        place: ["the forest"],
        at: ["in the forest"],
        spot: ["in a hollow tree", "under the ferns", "between the roots of an oak", "behind a fallen tree"],
        view: ["The sun fell through the leaves in golden spots.", "It smelled of moss and mushrooms.", "Far away a woodpecker was knocking."],
    },
    {
        place: ["the garden"],
        at: ["in the garden"],
        spot: ["behind the watering can", "under the pumpkin leaves", "between the bean poles", "beside the well"],
        view: ["The roses were just opening.", "Butterflies were dancing over the beans.", "The peas had climbed to the top of the fence."],
    },
    {
        place: ["the orchard"],
        at: ["in the orchard"],
        spot: ["in an apple tree", "under the ladder", "in a basket of pears", "behind the beehive"],
        view: ["The apples were almost ripe.", "The cherry trees stood in a row like soldiers.", "Sweet plums were lying in the grass."],
    },
    {
        place: ["the barn"],
        at: ["in the barn"],
        spot: ["under the hay", "behind the cart", "in an empty bucket", "between two sacks of oats"],
        view: ["Dust was dancing in the light.", "It was warm there and smelled of hay.", "The old pony was dreaming in the corner."],
    },
    {
        place: ["the market"],
        at: ["at the market"],
        spot: ["under the cheese stall", "behind a barrel of apples", "in a heap of straw", "between two baskets"],
        view: ["Everyone was talking at once.", "It smelled of cheese and fresh bread.", "Little flags were waving over the stalls."],
    },
    {
        place: ["the old mill"],
        at: ["at the old mill"],
        spot: ["behind the sacks of flour", "under the steps", "in a dusty corner", "between the wheels"],
        view: ["The great sails were turning slowly.", "Everything was white with flour.", "Swallows were flying in and out of the window."],
    },
]

// What one can love and lose.
TOYS: [
    { toy: ["kite"], look: ["red", "blue", "yellow"], joy: ["let it dance in the wind", "flew it over the roofs"] },
    { toy: ["ball"], look: ["red", "blue", "soft"], joy: ["bounced it against the wall", "threw it up to the clouds"] },
    { toy: ["drum"], look: ["tin", "red", "round"], joy: ["played it for everyone", "drummed like the rain"] },
    { toy: ["whistle"], look: ["silver", "tin", "wooden"], joy: ["blew it to call the birds", "wore it on a string"] },
    { toy: ["lantern"], look: ["golden", "paper", "tin"], joy: ["lit it when the sun went down", "let it shine like a star"] },
    { toy: ["scarf"], look: ["striped", "green", "soft"], joy: ["wore it even in the sun", "wore it three times around the neck"] },
    { toy: ["hat"], look: ["green", "straw", "pointed"], joy: ["wore it everywhere", "waved it at every bird"] },
    { toy: ["marble"], look: ["glass", "blue", "green"], joy: ["watched the light dance in it", "let it roll down the lane"] },
    { toy: ["spoon"], look: ["wooden", "silver", "long"], joy: ["stirred every soup with it", "played music with it"] },
    { toy: ["bell"], look: ["silver", "golden", "tiny"], joy: ["rang it to say hello", "rang it at every door"] },
    { toy: ["shell"], look: ["white", "pink", "striped"], joy: ["listened to the sea in it", "held it close to one ear"] },
    { toy: ["book"], look: ["thick", "blue", "tiny"], joy: ["read it under the blanket", "looked at all the pictures in it"] },
    { toy: ["boat"], look: ["wooden", "paper", "white"], joy: ["sailed it in every puddle", "sailed it down the stream"] },
    { toy: ["flute"], look: ["wooden", "silver", "long"], joy: ["played it for the birds", "played it when the sun went down"] },
    { toy: ["umbrella"], look: ["striped", "red", "yellow"], joy: ["opened it at the first drop of rain", "turned it like a wheel"] },
    { toy: ["top"], look: ["wooden", "striped", "golden"], joy: ["let it spin on the table", "made it hum like a bee"] },
]

// What is heard or seen in the night, what it seems to be, and what it is.
FEARS: [
    { strange: ["Something went tap, tap, tap at the window."], guess: ["a witch with long fingers", "a ghost"], truth: ["It was only a branch of the plum tree, and the wind was moving it."], bye: ["\"Good night, tree,\" said {h}.", "\"It only wants to come in,\" {h} laughed."] },
    { strange: ["Something went bump, bump, bump under the roof."], guess: ["a giant", "a troll with heavy boots"], truth: ["It was only an apple that rolled to and fro."], bye: ["So they ate the apple.", "\"Now it is my apple,\" said {h}."] },
    { strange: ["A tall dark shape was standing behind the door."], guess: ["a robber", "a giant"], truth: ["It was only a coat on a hook, with a hat on top."], bye: ["\"Good evening, coat,\" said {h}.", "{h} put on the hat and bowed."] },
    { strange: ["Two yellow eyes were shining in the corner."], guess: ["a wolf", "a dragon"], truth: ["They were only two brass buttons on an old coat."], bye: ["{h} polished them until they shone even more.", "\"They are winking at me,\" {h} laughed."] },
    { strange: ["A shadow with two long horns crept over the wall."], guess: ["a dragon", "a monster"], truth: ["It was only a snail that had crawled past the lamp."], bye: ["\"You are very small for a dragon,\" said {h}.", "{h} carried the snail back to the garden."] },
    { strange: ["Something was humming in the cupboard."], guess: ["a ghost", "an angry wizard"], truth: ["It was only a bee that had lost its way in a cup."], bye: ["{h} opened the window, and the bee flew home.", "\"What a big voice you have!\" {h} told the bee."] },
    { strange: ["Something was growling behind the stove."], guess: ["a wolf", "a hungry monster"], truth: ["It was only the kettle, and the tea was ready."], bye: ["So they all had a cup of tea.", "\"Good evening, kettle,\" said {h}."] },
]

// What can be built, of what, how it fails, and how it works.
WORKS: [
    { made: ["raft"], stuff: ["four planks and a rope", "old barrels"], fail: ["But it sank as soon as {h} sat down on it.", "But it came apart in the middle of the pond."], mend: ["tied every knot twice", "put empty bottles under it"], works: ["Now it floated like a swan.", "Now it carried them both across the pond."] },
    { made: ["swing"], stuff: ["a board and two ropes", "an old chair and some rope"], fail: ["But it hung so low that it touched the ground.", "But one rope was longer than the other."], mend: ["measured both ropes", "found a stronger branch"], works: ["Now it flew up to the leaves.", "Now it swung as high as the roof."] },
    { made: ["bird house"], stuff: ["six little boards", "an old box"], fail: ["But no bird wanted to live in it.", "But the door was too small for any bird."], mend: ["cut a bigger door", "put soft moss into it"], works: ["A week later two robins moved in.", "Soon they heard tiny voices in it."] },
    { made: ["cart"], stuff: ["a box and four wheels", "some old boards"], fail: ["But it only ran in circles.", "But a wheel came off and rolled down the lane."], mend: ["hammered every nail again", "put the wheels on straight"], works: ["Now it rolled down the lane like thunder.", "Now it ran as fast as a hare."] },
    { made: ["tower"], stuff: ["flat stones", "a heap of old boxes"], fail: ["But it leaned to one side and fell down.", "But a gust of wind knocked it over."], mend: ["put the biggest ones at the bottom", "built slowly, piece by piece"], works: ["Now it stood as straight as a tree.", "Now they could see the whole valley from it."] },
    { made: ["hut"], stuff: ["branches and leaves", "long poles and straw"], fail: ["But the rain came in at the top.", "But there was no room for {his} feet."], mend: ["put a thick roof on it", "made it twice as wide"], works: ["Now it was dry inside and smelled of summer.", "Now there was even room for guests."] },
    { made: ["windmill"], stuff: ["sticks and paper", "a post and an old shirt"], fail: ["But it did not turn at all.", "But the wind blew it into the pond."], mend: ["made the sails wider", "set it on top of the hill"], works: ["Now it turned so fast that it sang.", "Now every breeze made it dance."] },
    { made: ["scarecrow"], stuff: ["straw and an old coat", "a broom and a torn hat"], fail: ["But the crows sat on its arms.", "But it fell on its nose."], mend: ["gave it a bell for each hand", "tied it to a strong post"], works: ["Now the crows kept away from the peas.", "Now it stood up and looked very fierce."] },
]

// What can be learned, how it goes wrong, and how it goes well.
SKILLS: [
    { skill: ["whistle"], fail: ["Only air came out.", "It sounded like a leaky kettle."], well: ["a clear note rang over the roofs", "a blackbird answered"] },
    { skill: ["ride a bicycle"], fail: ["{he} rode straight into a heap of hay.", "After three yards {he} lay in the grass."], well: ["the wheels ran by themselves", "{he} rode once around the village"] },
    { skill: ["juggle with apples"], fail: ["All the apples rolled down the lane.", "One apple landed on {his} head."], well: ["three apples flew in a circle", "not one apple fell"] },
    { skill: ["skip stones"], fail: ["The stone went plop and was gone.", "The stone only frightened a frog."], well: ["the stone jumped five times", "the stone danced across the pond"] },
    { skill: ["play the fiddle"], fail: ["It sounded like a door that needs oil.", "All the birds flew away."], well: ["a little song came out", "everyone in the lane began to dance"] },
    { skill: ["row a boat"], fail: ["The boat only went in circles.", "{he} lost one of the oars."], well: ["the boat went straight ahead", "{he} crossed the whole pond"] },
    { skill: ["bake bread"], fail: ["The bread was as hard as a brick.", "The bread was black on both sides."], well: ["the bread was soft and golden", "the whole house smelled of fresh bread"] },
    { skill: ["skip rope"], fail: ["The rope got caught around {his} feet.", "After one jump {he} sat on the ground."], well: ["{he} jumped ten times in a row", "the rope sang in the air"] },
    { skill: ["swim"], fail: ["{he} swallowed half of the pond.", "{he} splashed like a wet dog and went down."], well: ["the water carried {him}", "{he} swam all the way to the pier"] },
    { skill: ["stand on {his} head"], fail: ["{he} fell over like a sack of flour.", "Something rolled out of every pocket."], well: ["the sky was down and the grass was up", "{he} stood there and counted to ten"] },
]

// Small creatures, what has happened to them, what helps, and how they say thank you.
CREATURES: [
    { creature: ["sparrow", "robin", "swallow"], trouble: ["Its wing was hurt, and it could not fly.", "It had fallen out of its nest."], care: ["made it a bed of soft hay", "gave it water and some crumbs"], until: ["After three days it spread its wings", "One morning it hopped onto the windowsill"], thanks: ["It sang its best song and flew away.", "It flew once around the house and was gone."] },
    { creature: ["beetle", "turtle"], trouble: ["It was lying on its back and waving its legs.", "It had fallen into a deep hole."], care: ["put a stick under it and pushed", "lifted it up with both hands"], until: ["At last it stood on its feet again", "It rested for a moment"], thanks: ["It nodded and went on its way.", "It marched off without looking back."] },
    { creature: ["butterfly", "moth"], trouble: ["It was caught in a spider web.", "It had fallen into a puddle, and its wings were wet."], care: ["set it free with a blade of grass", "carried it into the sun"], until: ["Slowly its wings opened", "It sat still until it was warm"], thanks: ["Then it landed on {his} nose and flew away.", "Then it danced twice around {his} head."] },
    { creature: ["duckling", "gosling"], trouble: ["It had lost its mother.", "It was all alone and very cold."], care: ["dried it with a towel", "carried it along the path and called"], until: ["At last its mother answered", "Then its mother came around the corner"], thanks: ["It ran to its mother as fast as its feet could go.", "It hopped and danced for joy."] },
    { creature: ["snail", "toad"], trouble: ["It was sitting on a hot stone and could not go on.", "It was dry and tired and had lost its way."], care: ["carried it to a wet leaf", "gave it a bath in a saucer"], until: ["Soon it felt better", "It looked around with wide eyes"], thanks: ["It stayed in the garden all summer.", "It seemed to be smiling."] },
    { creature: ["lost puppy", "lost kitten"], trouble: ["It had run away from the market and could not find the way back.", "It was wet and afraid of the thunder."], care: ["gave it some milk and spoke softly", "put a warm blanket around it"], until: ["Soon it stopped shaking", "Then {v} came running down the lane"], thanks: ["It licked {his} face from one ear to the other.", "It pushed its soft nose into {his} hand."] },
]

// What grows from a seed.
SEEDS: [
    { seed: ["sunflower"], grown: ["It grew taller than the door.", "Its yellow face looked over the fence."], use: ["The birds ate the seeds all winter.", "{h} and {f} called it the little sun."] },
    { seed: ["pumpkin"], grown: ["It grew as big as a cart.", "It grew so heavy that nobody could lift it."], use: ["It made soup for the whole village.", "The two of them cut a window into it and played house."] },
    { seed: ["bean"], grown: ["It climbed past the window and up to the roof.", "It climbed so high that it tickled the clouds."], use: ["There were beans for everyone.", "{h} and {f} sat in its shade and ate beans."] },
    { seed: ["cherry"], grown: ["A tiny tree came up, no taller than a spoon.", "Two small leaves came up and looked around."], use: ["\"One day it will be bigger than we are,\" said {f}.", "They promised to water it every day."] },
    { seed: ["melon"], grown: ["It grew round and green and shiny.", "It grew until it broke the fence."], use: ["It was as sweet as honey.", "They had juice up to their ears."] },
    { seed: ["poppy"], grown: ["One morning it was as red as fire.", "It opened like a little red umbrella."], use: ["Every bee in the garden came to visit.", "A year later there were a hundred."] },
]

// Who takes something in the night, and why.
THIEVES: [
    { stolen: ["a cake", "a piece of cheese"], trace: ["a line of crumbs", "tiny footprints in the flour"], lair: ["to a hole in the wall", "into the cellar"], thief: ["a family of mice"], why: ["Their babies were hungry.", "They were having a wedding."] },
    { stolen: ["a sock", "a mitten"], trace: ["a long woollen thread", "bits of wool on the floor"], lair: ["to the apple tree", "up to the roof"], thief: ["a magpie with five eggs"], why: ["It had made the softest nest in the valley.", "It wanted to keep its eggs warm."] },
    { stolen: ["a carrot", "a cabbage"], trace: ["leaves on the path", "small holes in the soil"], lair: ["under the fence", "to the shed"], thief: ["a baby donkey"], why: ["It had been lonely in its stable.", "It wanted to grow big and strong."] },
    { stolen: ["a spoon", "a shiny button"], trace: ["little scratches on the table", "a black feather"], lair: ["to the top of the tower", "to the old oak"], thief: ["a young crow"], why: ["It loved everything that glittered.", "It wanted a mirror for its nest."] },
    { stolen: ["a jar of honey", "a pot of jam"], trace: ["sticky drops", "a trail of ants"], lair: ["behind the shed", "to the hollow tree"], thief: ["a bear cub"], why: ["It had a sore throat.", "It had never tasted anything so good."] },
]

// What cannot be caught.
WONDERS: [
    { wonder: ["the moon"], tool: ["a bucket of water", "a long ladder"], almost: ["For a moment it seemed to lie in {his} hands.", "It was in the water, but it slipped through {his} fingers."], stays: ["\"It shines on both of us,\" said {f}. \"That is better than a bucket.\"", "\"Look, it follows us home by itself,\" said {f}."] },
    { wonder: ["the wind"], tool: ["a big sack", "a butterfly net"], almost: ["For a moment it seemed to be caught.", "It pulled at {his} ears and laughed."], stays: ["\"Do not lock it up,\" said {f}. \"Let us fly a kite instead.\"", "\"If you keep it, who will push the boats?\" asked {f}."] },
    { wonder: ["a cloud"], tool: ["a long rope", "a jar with a lid"], almost: ["It looked so near from the top of the hill.", "The fog came down, and then it was everywhere."], stays: ["\"We can lie in the grass and give it a name,\" said {f}.", "\"It would only make your bed wet,\" said {f}."] },
    { wonder: ["an echo"], tool: ["a jar with a lid", "a wooden box"], almost: ["{he} shouted loudly and shut the lid.", "It answered, but it was always somewhere else."], stays: ["\"It lives in the rocks,\" said {f}. \"We can visit it every day.\"", "\"I can be your echo,\" said {f}. \"Your echo!\""] },
    { wonder: ["a rainbow"], tool: ["a paintbrush", "a basket"], almost: ["But it moved back with every step.", "When {he} came to its end, it was gone."], stays: ["\"Let us paint one on the wall,\" said {f}.", "\"Some things are for looking,\" said {f}."] },
]

// What can break, and what it was for.
BREAKABLES: [
    { broken: ["blue jug"], how: ["{he} reached for the jam", "{he} waved {his} arms like a bird"], mend: ["glued it piece by piece", "made it into a flower pot"] },
    { broken: ["teapot"], how: ["{he} danced around the table", "{his} ball flew too high"], mend: ["glued the lid and the spout", "planted a little fern in it"] },
    { broken: ["window"], how: ["{his} ball flew too high", "{he} threw a pine cone at a tree"], mend: ["put in new glass", "swept up the glass and covered the hole"] },
    { broken: ["clock"], how: ["{he} wanted to see what makes a clock tick", "{he} wanted to make the day longer"], mend: ["put all the wheels back", "took it to the clockmaker"] },
    { broken: ["garden chair"], how: ["{he} jumped around like a frog", "{he} climbed up to pick a pear"], mend: ["gave it a new leg", "tied the leg with a strong rope"] },
    { broken: ["lamp"], how: ["{he} ran through the room with a kite", "{he} played tiger in the dark"], mend: ["made a new shade of paper", "glued it together"] },
]
}

/// The lists that belong to no frame.
pub(super) fn words(key: &str) -> Words {
    match key {
        "sort" => &["little", "young", "cheerful", "clever", "curious", "kind", "gentle", "lively"],
        "trait" => &[
            "loved to ask questions",
            "could never sit still",
            "sang from morning till night",
            "got up before the sun",
            "collected round stones",
            "knew the name of every tree",
            "laughed at almost everything",
            "dreamed of faraway lands",
            "counted the stars every night",
            "talked to the flowers",
            "was always a little hungry",
            "was never in a hurry",
            "had a new idea every day",
        ],
        "home" => &[
            "in the yellow house by the mill",
            "at the edge of the forest",
            "in a tiny house under the hill",
            "next to the bakery",
            "above the clock shop",
            "at the end of the lane",
            "beside the old well",
            "behind the school",
        ],
        "when" => &[
            "one morning",
            "one sunny morning",
            "one bright day",
            "one quiet afternoon",
            "one windy day",
            "one warm afternoon",
            "early one morning",
            "one Sunday",
            "one cloudy Monday",
            "one fine day",
        ],
        "next" => &["the next morning", "early in the morning", "before breakfast", "when the sun came up"],
        "went" => &["went", "ran", "walked", "hurried", "skipped"],
        "doing" => &[
            "humming a song",
            "eating a pear",
            "with a basket on one arm",
            "hopping on one leg",
            "whistling softly",
            "counting {~pets}",
            "with a {~colour} hat on",
            "singing about {~dream}",
        ],
        "danced" => {
            &["danced", "jumped into the air", "sang", "turned three times in a circle", "stood on one leg"]
        }
        "says" => &["said", "answered", "replied"],
        "laughs" => &["said", "laughed"],
        "thinks" => &["thought", "said softly", "told {himself}"],
        "lip" => &["chin", "lip", "nose"],
        "cries" => &["cried", "called", "shouted"],
        "whispers" => &["whispered", "breathed", "murmured"],
        "glad" => &["glad", "happy", "proud", "merry"],
        "gloomy" => &["sad", "gloomy", "lonely", "unhappy"],
        "sadly" => &["sadly", "quietly", "in a small voice"],
        "big" => &["big", "round", "shiny"],
        "toobig" => &["big", "small", "long", "wide"],
        "brighter" => &["brighter", "prettier", "nicer"],
        "many" => &["two", "three", "four", "five", "seven", "ten", "twelve"],
        "pets" => &["hens", "geese", "goldfish", "snails", "crickets", "kittens"],
        "petname" => &["Button", "Crumb", "Peanut", "Dot", "Captain"],
        "colour" => &["red", "blue", "green", "yellow", "white", "purple", "golden", "pink"],
        "liked" => &[
            "warm milk",
            "muddy boots",
            "long walks",
            "loud songs",
            "soft pillows",
            "old stories",
            "ripe pears",
            "summer storms",
            "big hats",
            "the smell of hay",
        ],
        "good" => &["climbing", "singing", "drawing", "telling jokes", "finding mushrooms", "making soup"],
        "bad" => &["whispering", "keeping secrets", "being quiet", "losing", "washing behind the ears"],
        "pocket" => &[
            "a piece of string",
            "a pencil",
            "a dried plum",
            "a lucky stone",
            "a grey feather",
            "a shiny chestnut",
            "a ball of wool",
        ],
        "junk" => &[
            "an old shoe",
            "a sleeping snail",
            "a rusty nail",
            "a wet leaf",
            "a lost sock",
            "a cold stone",
            "a surprised frog",
            "an empty nutshell",
        ],
        "food" => &[
            "plum pie",
            "loaf of bread",
            "round cheese",
            "berry tart",
            "pumpkin pie",
            "onion tart",
            "cheese roll",
            "potato pancake",
        ],
        "cake" => &["honey cake", "apple cake", "nut cake", "carrot cake", "cherry cake"],
        "little" => {
            &["a dry crust", "a cup of tea", "half of an apple", "a single nut", "a spoonful of porridge"]
        }
        "drink" => &["warm milk with honey", "cold apple juice", "hot cocoa", "mint tea", "berry juice"],
        "ago" => &["yesterday", "last night", "Sunday", "this morning"],
        "safe" => &[
            "under the pillow",
            "on a hook by the door",
            "in a box with a lid",
            "on the shelf above the bed",
        ],
        "gift" => &[
            "a picture of the valley",
            "a pair of warm socks",
            "a necklace of nuts",
            "a wooden spoon",
            "a paper star",
            "a crown of daisies",
            "a woollen cap",
        ],
        "dream" => &[
            "flying ships",
            "a queen of the bees",
            "a castle of cake",
            "the sea",
            "snow in July",
            "a whale with a hat",
            "golden fish",
            "a very small giant",
            "a talking tree",
        ],
        "bird" => &["blackbird", "thrush", "lark", "cuckoo", "finch", "wren"],
        "tree" => &["apple tree", "old oak", "willow", "hedge", "pear tree"],
        "far" => &["hills", "forest", "mountains", "village"],
        "lights" => &["stars", "moon and the stars", "bats", "fireflies"],
        "above" => &["clouds", "swallows", "evening star", "sky"],
        "bed" => &["grass", "hay", "moss", "clover"],
        "sky" => &[
            "A warm wind was blowing.",
            "The air was as clear as glass.",
            "Little white clouds were in the sky.",
            "Somewhere a {~bird} was singing.",
            "It was a day like a song.",
        ],
        "riches" => &["gold", "a castle", "a mountain of cake", "a ship with ten sails"],
        "heavy" => &["a stone", "a wet coat", "a sack of flour", "an iron door"],
        "stiff" => &["broom", "fence post", "candle", "frozen sock"],
        "dark" => &["a cellar", "the inside of a boot", "a sack", "black ink"],
        "red" => &["cherries", "poppies", "a hot stove"],
        "round" => &["plates", "apples", "moons", "cart wheels"],
        "bright" => &["stars", "dew", "two little lamps", "buttons"],
        "long" => &["a year", "a winter", "the road to the sea", "a rainy Sunday"],
        "tiny" => &["acorns", "beans", "buttons", "teaspoons"],
        "noise" => &["music", "a hundred tiny feet", "applause", "little drums"],
        "tipped" => &["a bathtub", "the lake", "a hundred buckets"],
        "cover" => &["blanket", "pillow", "quilt"],
        "shaking" => &["knees", "hands", "ears"],
        "spotted" => &["nose", "forehead", "left ear", "right ear"],
        "sleeper" => &["stone", "bear in winter", "kitten", "log"],
        "house" => &["house", "village", "street"],
        "weapon" => &["a candle", "a wooden spoon", "a broom", "an umbrella"],
        "hiding" => &["under the bed", "in the cupboard", "behind the stove", "in the shed"],
        "kicked" => &["grass", "fence", "wall"],
        "fence" => &["fence", "well", "gate", "hedge"],
        "worktime" => &["morning", "day", "week"],
        "span" => &["year", "summer", "week"],
        "dull" => &["the weather", "the price of eggs", "onions", "the leaky roof"],
        "name" => &["potato head", "silly goose", "old sock", "sour plum"],
        _ => panic!("there is no list {key}"),
    }
}
