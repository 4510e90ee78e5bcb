"""Short English words that the generator writes into images, beside letters that are no word."""

_LIST = """
    able acid age ago aim air all also and ant any ape apple arch area arm army art ask aunt away
    baby back bad bag bake ball band bank bar base bath beach bean bear beat bed bee beef bell belt
    bend best big bike bill bird bit bite black boat body bold bone book boot born boss both bowl
    box boy brain bread brick brown brush bug bus busy cake call calm camp can candy cap car card
    care cart case cash cat cave chair chalk cheap chef chess city clay clean clock cloud club coal
    coat code coin cold cook cool copy corn cost cow crab cream crew crow cry cup cut dad dance dark
    date day deal dear deep deer desk dish dive dog doll door down draw dream dress drink drop drum
    dry duck dust duty each eagle ear early earth east easy edge egg eight elf end engine every exit
    eye face fact fair fall fan farm fast fat fear feed feet few field film final find fine fire
    first fish five flag flat flow fly foam fog food foot fork form fort four fox free fresh frog
    fruit fuel full fun game gap gate gear ghost gift girl give glad glass glove goat gold golf good
    goose grape grass great grow gulf gum guy hair half hall ham hand happy hard hat hawk head heat
    help hen herb hero hide high hill hint hip hold hole home honey hood hook hope horn horse hot
    hotel hour house huge hunt ice idea inch ink iron item ivy jam jar jazz jeans jet job join joke
    joy juice jump jury just keep key kid kind king kite knee knife lake lamb lamp land large last
    late law lazy leaf left leg lemon less life lift light like lime line lion lip list live load
    lock log long look loud love luck lunch mad magic mail main make man map mark mask math meal
    meat melt menu mice milk mill mind mine mint mix mode mole moon moose mouse mouth move much mud
    mug music nail name navy near neck need nest net never new news next nice night nine noon north
    nose note nut oak ocean odd off oil old olive one onion only open orbit oven owl own page paint
    pair palm pan paper park part past path paw pea peace pear pen pet phone photo piano pie pig
    pilot pin pine pizza place plan plane plant play plum pond pony pool poor port post pot proud
    pull pump pure push queen quick quiet quiz rabbit race radio rain ram rat read real rice rich
    ride ring river road robot rock roof room root rope rose round row rug rule run sad safe sail
    salt same sand save sea seat see seed self sell send seven shade ship shirt shoe shop short show
    sick side sign silk sing six size skin sky sleep slow small smart smile smoke snail snow soap
    soft soil solo some song soon soup sour south space spoon sport spot star start stay step stone
    stop store storm sugar suit sun swan sweet swim table tail tall tank tape task taste taxi tea
    team ten tent test text thank thin three tide tiger time tiny tired toad toast today toe tool
    tooth top tour town toy track train tree trip truck true trust tube tuna turn twin two ugly
    uncle under up use van vase vest video view visit voice vote wagon wait walk wall warm wash wasp
    water wave wax way web week well west wet whale wheat wheel white wide wife wild win wind wine
    wing winner wise wolf wood wool word work world worm yacht yard year yes young zebra zero zone
    zoo
"""
WORDS: tuple[str, ...] = tuple(word for word in _LIST.split() if 3 <= len(word) <= 5)
